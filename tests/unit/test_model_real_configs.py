"""config.json files as they are on the Hub: accepted, and what a manifest holds builds what transformers builds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from tallystick_model.architectures import base_class, served_classes
from tallystick_model.config import build_config, checkpoint_config, read_checkpoint
from tallystick_model.config_keys import LEFT_OUT, spelt_keys
from tallystick_model.skeleton import build_skeleton
from tallystick_protocol.errors import ManifestError

CONFIGS = sorted((Path(__file__).parents[1] / "vectors" / "configs").glob("*.json"))


def written(name: str, **changes: Any) -> dict[str, Any]:
    path = next(path for path in CONFIGS if path.stem == name)
    return json.loads(path.read_text()) | changes  # type: ignore[no-any-return]


def values_of(config: Any, apart: frozenset[str]) -> dict[str, Any]:
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {key: value for key, value in values.items() if key not in apart}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_manifest_builds_what_transformers_builds_of_the_file(path: Path) -> None:
    read = read_checkpoint(json.loads(path.read_text()))
    expected = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    rebuilt = build_config(read.values)
    taken = spelt_keys(type(expected)) - rebuilt.to_dict().keys()
    apart = LEFT_OUT | frozenset(read.left_out) | taken
    assert values_of(rebuilt, apart) == values_of(expected, apart)


FIRST_OF_TYPE = {json.loads(path.read_text())["model_type"]: path for path in reversed(CONFIGS)}


@pytest.mark.parametrize("path", FIRST_OF_TYPE.values(), ids=lambda path: path.stem)
def test_a_model_is_made_of_the_file(path: Path) -> None:
    file = json.loads(path.read_text())
    if file.get("num_hidden_layers", 0) > 40:
        file["num_hidden_layers"] = 8
    kind, named = file["model_type"], file["architectures"][0]
    architecture = named if named in served_classes(kind) else base_class(kind)
    assert architecture is not None
    assert build_skeleton(checkpoint_config(file), architecture).layers


def test_an_older_spelling_means_what_it_meant_whether_or_not_it_is_the_default() -> None:
    for name, expected in (("pythia-70m", 0.25), ("stablelm-base-alpha-3b", 1.0)):
        assert build_config(checkpoint_config(written(name))).rope_parameters["partial_rotary_factor"] == expected


def test_what_a_model_reads_though_its_config_has_no_such_field_is_kept() -> None:
    skeleton = build_skeleton(checkpoint_config(written("qwen3-30b-a3b", num_hidden_layers=1)), "Qwen3MoeForCausalLM")
    assert tuple(skeleton.weights()["model.layers.0.self_attn.q_proj.weight"].shape) == (32 * 128, 2048)
    config = build_config(checkpoint_config(written("deberta-v3-base-mnli")))
    assert (config.share_att_key, config.position_buckets, config.norm_rel_ebd) == (True, 256, "layer_norm")


def test_a_field_that_is_none_is_not_its_default() -> None:
    assert transformers.MistralConfig().sliding_window == 4096
    assert build_config(checkpoint_config(written("mistral-nemo-instruct-2407"))).sliding_window is None


def test_a_value_that_a_class_computes_may_be_overridden_as_in_transformers() -> None:
    file = written("flan-t5-small", dense_act_fn="relu")
    assert build_config(checkpoint_config(file)).dense_act_fn == "relu"
    assert build_config(checkpoint_config(written("flan-t5-small"))).dense_act_fn == "gelu_new"


def test_what_is_left_out_is_told() -> None:
    assert read_checkpoint(written("bert-base-ner")).left_out == ("_num_labels", "output_past")
    assert read_checkpoint(written("gemma-2-2b")).left_out == ("cache_implementation",)
    assert read_checkpoint(written("llama-2-7b")).left_out == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [("warp_drive", 1), ("use_warp", True), ("norm", "warped"), ("experts_per_token", 4), ("to_dict", 1), ("_x", 1)],
)
def test_a_key_that_nobody_knows_is_refused_and_nobody_is_told_to_remove_it(key: str, value: Any) -> None:
    with pytest.raises(ManifestError, match=key) as refused:
        checkpoint_config(written("llama-3.2-1b", **{key: value}))
    assert "remove" not in refused.value.message


def test_a_switch_that_nothing_reads_may_be_off_but_not_on() -> None:
    assert read_checkpoint(written("llama-3.2-1b", use_warp=False)).left_out == ("use_warp",)
    with pytest.raises(ManifestError, match="use_warp"):
        checkpoint_config(written("llama-3.2-1b", use_warp=True))


def test_names_that_sound_like_kernels_are_taken_for_nothing_only_if_they_are() -> None:
    assert read_checkpoint(written("gpt2", _attn_implementation_autoset=True)).left_out[-1:] == (
        "_attn_implementation_autoset",
    )
    for key, value in (("_attn_implementation_autoset", "evil/kernel"), ("cache_implementation", {"a": 1})):
        with pytest.raises(ManifestError, match=key):
            checkpoint_config(written("gpt2", **{key: value}))


HUGE: list[tuple[str, str, dict[str, Any]]] = [
    ("bart-large-cnn", "BartForConditionalGeneration", {"decoder_layers": 10**6}),
    ("bart-large-cnn", "BartForConditionalGeneration", {"encoder_layers": 10**6}),
    ("bart-large-cnn", "BartForConditionalGeneration", {"decoder_ffn_dim": 10**9}),
    ("t5-3b", "T5ForConditionalGeneration", {"num_decoder_layers": 10**6}),
    ("t5-3b", "T5ForConditionalGeneration", {"d_ff": 10**9}),
    ("t5-small", "LongT5ForConditionalGeneration", {"model_type": "longt5", "num_layers": 10**6}),
    ("switch-base-8", "SwitchTransformersForConditionalGeneration", {"num_experts": 10**7}),
    ("nllb-200-distilled-600m", "NllbMoeForConditionalGeneration", {"model_type": "nllb-moe", "num_experts": 10**7}),
    ("mixtral-8x7b", "MixtralForCausalLM", {"num_local_experts": 10**7}),
    ("deepseek-v3", "DeepseekV3ForCausalLM", {"n_routed_experts": 10**7}),
    ("gpt2", "GPT2LMHeadModel", {"n_layer": 10**6}),
    ("gpt-neo-125m", "GPTNeoForCausalLM", {"attention_types": [[["global"], 10**9]], "num_layers": 10**9}),
    ("gpt-neo-125m", "GPTNeoForCausalLM", {"max_position_embeddings": 1 << 20}),
    ("xglm-564m", "XGLMForCausalLM", {"max_position_embeddings": 1 << 22}),
    ("llama-2-7b", "LlamaForCausalLM", {"hidden_size": 1 << 17, "intermediate_size": 1 << 20,
                                        "num_hidden_layers": 512}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "architecture", "changes"), HUGE, ids=lambda value: str(value)[:60])
def test_what_would_take_long_to_build_is_refused_at_once(
    name: str, architecture: str, changes: dict[str, Any]
) -> None:
    sound = checkpoint_config({**written(name), **{key: changes[key] for key in changes.keys() & {"model_type"}}})
    began = time.process_time()
    with pytest.raises(ManifestError):
        build_skeleton({**sound, **changes}, architecture)
    assert time.process_time() - began < 3


def test_a_layer_of_experts_larger_than_memory_is_built() -> None:
    small = written("deepseek-v3", num_hidden_layers=4, n_routed_experts=1024, n_group=8)
    weights = build_skeleton(checkpoint_config(small), "DeepseekV3ForCausalLM").weights()
    assert weights["model.layers.3.mlp.experts.gate_up_proj"].numel() * 4 > 100e9
