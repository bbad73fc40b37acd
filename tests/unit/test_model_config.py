"""Configs are bounded and allow-listed before anything is built (hostile catalogue M02-M04)."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from harness.checkpoints import SMALL
from tallystick_model.architectures import model_class
from tallystick_model.config import build_config, checkpoint_config
from tallystick_protocol.errors import ManifestError

GOOD = checkpoint_config(transformers.LlamaConfig(**SMALL).to_dict())


def test_a_manifests_config_builds_what_the_checkpoint_was() -> None:
    config = build_config(GOOD)
    assert (config.hidden_size, config.num_key_value_heads, config.rope_parameters["rope_theta"]) == (72, 2, 10000.0)


def test_older_spellings_of_a_checkpoint_become_fields() -> None:
    old = {**{key: value for key, value in GOOD.items() if key != "rope_parameters"}, "rope_theta": 5e5}
    assert checkpoint_config(old)["rope_parameters"]["rope_theta"] == 5e5


@pytest.mark.parametrize(
    "key",
    [
        "auto_map",
        "trust_remote_code",
        "_attn_implementation",
        "attn_implementation",
        "_attn_implementation_internal",
        "custom_generate",
        "experts_implementation",
        "quantization_config",
        "no_such_key",
    ],
)
@pytest.mark.parametrize("read", [build_config, checkpoint_config])
def test_keys_that_name_code_kernels_or_nothing_are_refused_by_name(key: str, read: Any) -> None:
    with pytest.raises(ManifestError, match=key):
        read({**GOOD, key: {"AutoModel": "evil.Model"}})


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", "_name_or_path", "transformers_version"])
def test_a_manifest_does_not_set_what_it_must_not(key: str) -> None:
    with pytest.raises(ManifestError, match=key):
        build_config({**GOOD, key: "float16"})
    checkpoint_config({**GOOD, key: "float16"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", -1),
        ("num_attention_heads", "32"),
        ("vocab_size", 0),
        ("num_attention_heads", True),
        ("hidden_size", 10**9),
        ("num_hidden_layers", 10**6),
        ("vocab_size", 1 << 40),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "1e-5"),
        ("max_position_embeddings", 1 << 30),
        ("rope_parameters", {"rope_type": "default", "rope_theta": float("inf")}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("hidden_act", "a\x00b"),
        ("num_key_value_heads", 4),
        ("hidden_act", ["silu"]),
        ("rope_parameters", {"a": {"b": {"c": {"d": {"e": 1}}}}}),
        ("is_encoder_decoder", True),
        ("pad_token_id", 1 << 62),
        ("head_dim", 2.5),
        ("rope_parameters", {"rope_type": "x"}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_values_out_of_bounds_are_refused_before_anything_is_built(key: str, value: Any) -> None:
    with pytest.raises(ManifestError):
        build_config({**GOOD, key: value})


@pytest.mark.parametrize("model_type", ["no_such_type", "", None, 7, "../llama"])
def test_a_model_type_that_transformers_does_not_know_is_refused_without_a_prompt(model_type: Any) -> None:
    with pytest.raises(ManifestError, match="model_type"):
        build_config({**GOOD, "model_type": model_type})


@pytest.mark.parametrize("architecture", ["BertModel", "LlamaForConditionalGeneration", "__class__", "logging", ""])
def test_an_architecture_is_one_of_its_model_types_own(architecture: str) -> None:
    with pytest.raises(ManifestError, match="architecture"):
        model_class(build_config(GOOD), architecture)
