"""Small random models as GGUF files: names, layouts and metadata as llama.cpp's converter writes each architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from harness import checkpoints

Array = NDArray[Any]
ROWS = 320
SIZES: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
WIDE = {**SIZES, "head_dim": 16}
EXPERTS = {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
BLOCKS = {"vocab_size": ROWS, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
STATES = {key: SIZES[key] for key in SIZES if "heads" not in key and "max" not in key} | {
    "state_size": 8, "intermediate_size": 128, "time_step_rank": 4,
}  # fmt: skip
CONVOLUTIONS = {**SIZES, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
DELTAS = {
    **SIZES, "num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "full_attention_interval": 4,
}  # fmt: skip
T5_SIZES = {
    "vocab_size": ROWS, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def as_it_is(name: str, values: Array, config: Any) -> Iterator[tuple[str, Array]]:
    yield name, values


def halves_as_pairs(name: str, values: Array, config: Any) -> Iterator[tuple[str, Array]]:
    """Llama: the rows of queries and keys, whose rotary halves llama.cpp wants as pairs."""
    heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    yield name, values


def norms_by_one(name: str, values: Array, config: Any) -> Iterator[tuple[str, Array]]:
    """Gemma and Nemotron: norms as what they multiply by."""
    yield name, values + 1 if name.endswith("norm.weight") else values


def transposed(name: str, values: Array, config: Any) -> Iterator[tuple[str, Array]]:
    """GPT-2: its matrices are Conv1D's, the other way round."""
    turned = re.search(r"(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$", name)
    yield name, values.T if turned else values


def grouped_by_kind(name: str, values: Array, config: Any) -> Iterator[tuple[str, Array]]:
    """Bloom: queries, keys and values of all heads, not of one head after the other."""
    if "attn_qkv" in name:
        values = values.reshape(config.n_head, 3, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)
    yield name, values


def states(name: str, values: Array, config: Any) -> Iterator[tuple[str, Array]]:
    """Mamba: A itself, and convolutions without their middle dimension."""
    if name.endswith("ssm_a"):
        values = -np.exp(values)
    yield name, values[:, 0] if name.endswith("conv1d.weight") else values


def short_convolutions(name: str, values: Array, config: Any) -> Iterator[tuple[str, Array]]:
    yield name, values[:, 0] if name.endswith("shortconv.conv.weight") else values


def experts_apart(name: str, values: Array, config: Any) -> Iterator[tuple[str, Array]]:
    """Experts: gates and what they gate are two tensors; a shared expert's gate is a vector."""
    if name.endswith("gate_up_exps"):
        half = values.shape[1] // 2
        yield name.replace("gate_up_exps", "gate_exps.weight"), values[:, :half]
        yield name.replace("gate_up_exps", "up_exps.weight"), values[:, half:]
    elif name.endswith("down_exps"):
        yield f"{name}.weight", values
    else:
        yield name, values[0] if name.endswith("gate_inp_shexp.weight") else values


def gated_deltas(name: str, values: Array, config: Any) -> Iterator[tuple[str, Array]]:
    """Qwen 3.5: norms as what they multiply by, A itself, and value heads not by the key head that they belong to."""
    keys, width = config.linear_num_key_heads, config.linear_value_head_dim
    before = 2 * keys * config.linear_key_head_dim

    def regrouped(rows: Array, size: int) -> Array:
        return rows.reshape(keys, -1, size, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

    if name.endswith("norm.weight") and "ssm_norm" not in name:
        values = values + 1
    elif name.endswith(("ssm_a", "ssm_dt.bias", "ssm_alpha.weight", "ssm_beta.weight")):
        values = regrouped(-np.exp(values) if name.endswith("ssm_a") else values, 1)
    elif name.endswith("attn_gate.weight"):
        values = regrouped(values, width)
    elif name.endswith(("attn_qkv.weight", "ssm_conv1d.weight")):
        values = np.concatenate([values[:before], regrouped(values[before:], width)])
        values = values[:, 0] if "conv1d" in name else values
    elif name.endswith("ssm_out.weight"):
        values = regrouped(values.T, width).T
    yield name, values


@dataclass(frozen=True)
class Kind:
    """An architecture of GGUF: the class in transformers, a small config, what is done to its tensors."""

    model: str
    sizes: dict[str, Any]
    written: Callable[[str, Array, Any], Iterator[tuple[str, Array]]] = as_it_is
    keys: dict[str, Any] = field(default_factory=dict)
    """Metadata beside what every architecture has."""


KINDS = {
    "llama": Kind("LlamaForCausalLM", SIZES, halves_as_pairs),
    "qwen2": Kind("Qwen2ForCausalLM", SIZES),
    "qwen3": Kind("Qwen3ForCausalLM", {**SIZES, "head_dim": 128}),
    "falcon": Kind("FalconForCausalLM", {key: SIZES[key] for key in SIZES if "inter" not in key and "_key" not in key}),
    "phi3": Kind("Phi3ForCausalLM", SIZES | {"pad_token_id": 2}),
    "bloom": Kind("BloomForCausalLM", {**BLOCKS, "hidden_size": 64}, grouped_by_kind),
    "stablelm": Kind("StableLmForCausalLM", SIZES),
    "gpt2": Kind("GPT2LMHeadModel", {**BLOCKS, "n_embd": 64}, transposed),
    "starcoder2": Kind("Starcoder2ForCausalLM", SIZES),
    "mamba": Kind("MambaForCausalLM", STATES, states),
    "nemotron": Kind("NemotronForCausalLM", WIDE, norms_by_one),
    "gemma2": Kind("Gemma2ForCausalLM", WIDE | {"pad_token_id": 0}, norms_by_one),
    "gemma3": Kind("Gemma3ForCausalLM", WIDE | {"pad_token_id": 0}, norms_by_one),
    "qwen2moe": Kind("Qwen2MoeForCausalLM", EXPERTS | {"shared_expert_intermediate_size": 96}, experts_apart),
    "qwen3moe": Kind("Qwen3MoeForCausalLM", EXPERTS | {"norm_topk_prob": True}, experts_apart),
    "t5": Kind("T5ForConditionalGeneration", T5_SIZES | {"feed_forward_proj": "gated-gelu"}),
    "qwen35": Kind("Qwen3_5ForCausalLM", DELTAS, gated_deltas, {
        "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.time_step_rank": 4,
        "ssm.inner_size": 64, "full_attention_interval": 4, "rope.dimension_count": 8,
        "rope.dimension_sections": [2, 1, 1, 0],
    }),
    "lfm2": Kind("Lfm2ForCausalLM", CONVOLUTIONS, short_convolutions),
}


UNMAPPED = {"gate_up_proj": "ffn_gate_up_exps", "dt_bias": "ssm_dt.bias"}
"""What the package gguf has no name for: it is written in parts, or by the converter itself."""


def random_model(arch: str, **changes: Any) -> Any:
    """A model with random weights, livelier than at initialisation. changes: to its config."""
    kind = KINDS[arch]
    torch.manual_seed(0)
    cls = getattr(transformers, kind.model)
    model = cls(cls.config_class(**{**kind.sizes, **changes})).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_gguf(
    path: Path, arch: str, model: Any, *, words: list[str] | None = None, keys: dict[str, Any] | None = None,
    tables: dict[str, Array] | None = None,
) -> Path:  # fmt: skip
    """Write a model as a GGUF file in fp32.

    words: its tokens, by default `word_list`'s. keys: metadata beside or instead of what belongs to the model. tables:
    tensors that do not belong to it.
    """
    config = model.config
    said = {f"{arch}.{key}": value for key, value in {**_keys(config), **KINDS[arch].keys}.items()}
    said |= {"general.license": "cc0-1.0", **(keys or {})}
    writer = gguf.GGUFWriter(path, said.pop("general.architecture", arch))
    for key, value in said.items():
        _add_key(writer, key, value)
    if arch == "t5":
        _add_pieces(writer)
    else:
        _add_words(writer, words or word_list(), config.pad_token_id)
    for name, values in {**_tensors(arch, model), **_factors(config), **(tables or {})}.items():
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(arch: str, model: Any) -> dict[str, Array]:
    """A model's tensors by llama.cpp's names, tied ones once."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    found: dict[str, Array] = {}
    for name, tensor in model.state_dict().items():
        stem, leaf = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name).groups()  # type: ignore[union-attr]
        new = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
        if new is None and (other := UNMAPPED.get(stem.rpartition(".")[2])):
            new = f"blk.{stem.split('.')[2]}.{other}"
        for written, values in KINDS[arch].written(f"{new}{leaf or ''}", tensor.numpy(), model.config) if new else ():
            found.setdefault(written, values)
    if model.config.tie_word_embeddings and getattr(model.config, "scale_decoder_outputs", True):  # not so a later T5
        found.pop("output.weight", None)
    return found


def _factors(config: Any) -> dict[str, Array]:
    """What Llama 3.1 divides the frequencies of its rotary tables by, which no key says."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return {}
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    plain = rope["rope_theta"] ** -(torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
    return {"rope_freqs.weight": (plain / scaled).numpy()}


def _keys(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter says of every model, as far as this one has it."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    said = {
        "context_length": _first(config, "max_position_embeddings", "n_positions") or 256,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": _first(config, "intermediate_size", "d_ff") or 4 * config.hidden_size,
        "attention.head_count": _first(config, "num_attention_heads"),
        "attention.head_count_kv": _first(config, "num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": _first(config, "rms_norm_eps", "norm_eps"),
        "attention.layer_norm_epsilon": _first(config, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "attention.key_length": _first(config, "head_dim"),
        "attention.sliding_window": _first(config, "sliding_window"),
        "attention.relative_buckets_count": _first(config, "relative_attention_num_buckets"),
        "decoder_start_token_id": _first(config, "decoder_start_token_id"),
        "rope.freq_base": rope.get("rope_theta"),
        "vocab_size": config.vocab_size,
        "expert_count": _first(config, "num_experts"),
        "expert_used_count": _first(config, "num_experts_per_tok"),
        "expert_feed_forward_length": _first(config, "moe_intermediate_size"),
        "expert_shared_feed_forward_length": _first(config, "shared_expert_intermediate_size"),
        "ssm.conv_kernel": _first(config, "conv_kernel"),
        "ssm.state_size": _first(config, "state_size"),
        "ssm.time_step_rank": _first(config, "time_step_rank"),
        "ssm.inner_size": _first(config, "intermediate_size"),
        "shortconv.l_cache": _first(config, "conv_L_cache"),
    }
    if config.model_type == "lfm2":
        kept = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
        said["attention.head_count_kv"] = kept
    return {key: value for key, value in said.items() if value is not None}


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _add_key(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    else:
        writer.add_uint32(key, value)


def word_list() -> list[str]:
    """As many tokens as a model has rows; ids as in `checkpoints.add_companions`, nothing called <|endoftext|>."""
    vocab = checkpoints.tokenizer().get_vocab()
    return sorted(vocab, key=lambda word: vocab[word]) + [f"[PAD{at}]" for at in range(len(vocab), ROWS)]


def _add_words(writer: Any, words: list[str], pad: int | None) -> None:
    """Bytes and merges, as GPT-2's."""
    merges = json.loads(checkpoints.tokenizer().to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if at < 2 else 5 if word.startswith("[PAD") else 1 for at, word in enumerate(words)])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if pad is not None:
        writer.add_pad_token_id(pad)


def _add_pieces(writer: Any) -> None:
    """Scored pieces, as T5's; the blanks are called by their numbers."""
    words = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    words += [f"[PAD{at}]" for at in range(len(words), ROWS)]
    writer.add_tokenizer_model("t5")
    writer.add_token_list(words)
    writer.add_token_scores([-float(at) for at in range(len(words))])
    writer.add_token_types([3, 3, 2] + [1] * (len(words) - 3))
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(2)
