"""A Llama as a GGUF file, written with the gguf package from a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def llama_gguf(folder: Path, path: Path, kind: gguf.GGMLQuantizationType, fill: bool = False) -> Path:
    """Write a Llama checkpoint folder as GGUF, its matrices quantised, queries and keys in llama.cpp's row order.

    fill: name the ids up to the vocabulary's size that the tokenizer does not make, for llama.cpp wants them all.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_string("general.license", "cc0-1.0")
    words = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    if fill:
        words += [f"<unused {at}>" for at in range(len(words), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in ("<s>", "</s>") else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, values in load_file(folder / "model.safetensors").items():
        _add(writer, name, values.float().numpy(), config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, values: Any, config: dict[str, Any], kind: gguf.GGMLQuantizationType) -> None:
    if name.startswith("model.layers."):
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        new = f"blk.{number}.{_NAMES[rest]}"
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}.get(rest[10:11])
        if heads and rest.startswith("self_attn."):
            half = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
            values = half.swapaxes(1, 2).reshape(values.shape)
    else:
        new = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(
            name, "output.weight"
        )
    if values.ndim == 1:
        writer.add_tensor(new, values.astype(np.float32))
    else:
        writer.add_tensor(new, gguf.quantize(values.astype(np.float32), kind), raw_dtype=kind)
