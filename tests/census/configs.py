"""A tiny random config for every text model type that transformers offers for language modelling."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tallystick_model.publishing.shrinking import shrink

VOCAB = 320
LAYERS = 4

TASKS = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

NO_TEXT = {
    "blt": "works on bytes in patches that it finds itself",
    "perceiver": "works on an array of latents, not on layers of tokens",
    "musicgen": "takes several codes of sound for each position",
    "musicgen_melody": "takes several codes of sound for each position",
    "voxtral_realtime": "needs sound beside every token",
    "gemma4_assistant": "drafts for another model, whose cache it reads",
    "gemma4_unified_assistant": "drafts for another model, whose cache it reads",
    "gemma3n": "its vision tower needs timm and Pillow to be built",
}
"""What stands behind a refusal, where the error does not tell."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the census."""

    type: str
    task: str
    architecture: str

    @property
    def name(self) -> str:
        return f"{self.type}:{self.task}"


def entries() -> list[Entry]:
    """Every (type, class), in the order of transformers' tables; a class that does two tasks comes once."""
    found: dict[tuple[str, str], Entry] = {}
    for task, mapping in TASKS.items():
        for model_type, architecture in mapping.items():
            key = (model_type, architecture)
            if key in found and task == "seq2seq":
                del found[key]
            found.setdefault(key, Entry(model_type, task, architecture))
    return list(found.values())


def tiny_config(entry: Entry) -> Any:
    """The config object of an entry, small."""
    cls = CONFIG_MAPPING[entry.type]
    model = getattr(transformers, entry.architecture)
    if model.config_class is not cls and isinstance(model.config_class, type):
        cls = model.config_class
    return cls(**merged(_small(cls), _extra(cls, entry)))


def merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`more` over `values`, inner configs too."""
    found = dict(values)
    for name, value in more.items():
        inner = found.get(name)
        found[name] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return found


def _small(cls: Any, whole: Any = None) -> dict[str, Any]:
    """The class's own defaults, or those of `whole`, as plain fields, cut down: what differs from the defaults."""
    fields = {field.name for field in dataclasses.fields(cls)}
    whole = cls() if whole is None else whole
    values: dict[str, Any] = {}
    written = whole.to_dict()
    for name in fields - cls.sub_configs.keys():
        if not name.startswith("_") and name not in ("layer_types", "mlp_layer_types"):
            values[name] = written.get(name, getattr(cls, name, None))
    kept = {name: value for name, value in values.items() if type(value) in (int, float, str, bool)}
    small = shrink(kept, layers=LAYERS, vocab=VOCAB)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        if type(small.get(name)) is int:
            small[name] = min(small[name], 512)
    for name, value in list(small.items()):
        if name.endswith(("_token_id", "_token_index")) and type(value) is int and value >= VOCAB:
            small[name] = 7 + len(name) % 9
    found = {name: small[name] for name in small if small[name] != values[name]}
    for name in cls.sub_configs:
        inner = getattr(whole, name, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            found[name] = {"model_type": inner.model_type, **_small(type(inner), inner)}
    return found


def _extra(cls: Any, entry: Entry) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    fields = {field.name for field in dataclasses.fields(cls)}
    if entry.task == "causal" and "is_decoder" in fields:
        extra["is_decoder"] = True
    return extra | OVERRIDES.get(entry.name, OVERRIDES.get(entry.type, {}))


_HYBRID = ["linear_attention", "hybrid"] * 2
_T5GEMMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "sliding_window": 16}  # fmt: skip
_BERT = {"model_type": "bert", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 4, "vocab_size": VOCAB}  # fmt: skip
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
          "indexer_compress_ratio": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 64, "split_ngram_parts": 2,
          "ple_layer_ids": [1], "ple_embed_dim": 16, "heads_per_ngram": 2}  # fmt: skip
_DOTS3 = {"head_dim": 32, "per_layer_config": {
    f"0{layer}": {"num_attention_heads": 2, "num_key_value_heads": 2} for layer in (2, 3)}}
_DRAFTER = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32], "is_decoder": True},
    "reformer:masked": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32], "is_decoder": False},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "zamba": {"layers_block_type": _HYBRID, "attention_head_dim": 32, "n_mamba_heads": 2,
              "attention_hidden_size": 128},
    "zamba2": {"layers_block_type": _HYBRID, "n_mamba_heads": 8, "num_mem_blocks": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4,
                     "altup_num_inputs": 2, "vocab_size_per_layer_input": VOCAB},
    "gemma4_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}},
    "t5gemma": {"encoder": _T5GEMMA, "decoder": _T5GEMMA, "vocab_size": VOCAB},
    "encoder-decoder": {"encoder": _BERT, "decoder": {**_BERT, "is_decoder": True, "add_cross_attention": True}},
    "funnel": {"block_sizes": [2, 2], "block_repeats": [1, 1]},
    "blenderbot": {"encoder_layers": 4, "decoder_layers": 4},
    "bailing_hybrid": {"layer_group_size": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "glm_moe_dsa": {"indexer_types": ["full"] * 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "longcat_flash": {"qk_head_dim": 32, "head_dim": 16},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "dots3_note_text": _DOTS3,
    "dots3_note": _DOTS3,
    "qwen4_exp_text": _QWEN4 | {"eos_token_id": 3},
    "qwen4_exp": _QWEN4 | {"eos_token_id": 3},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "vibevoice_asr": {
        f"{kind}_tokenizer_encoder_config": {"num_filters": 4, "depths": [1] * 7} for kind in ("semantic", "acoustic")
    },
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64}}}},
    "gemma4_assistant": {"text_config": _DRAFTER},
    "gemma4_unified_assistant": {"text_config": _DRAFTER},
    "esmc": {"vocab_size": VOCAB},
    "whisper": {"begin_suppress_tokens": [7, 8]},
    "luke": {"entity_vocab_size": 16},
}
"""What a tiny config needs beyond cut-down sizes, so that its parts fit each other."""
