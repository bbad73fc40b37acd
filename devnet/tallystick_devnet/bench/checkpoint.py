"""The checkpoint that is measured when none is given: a Llama of 134 million random fp32 parameters."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tallystick_devnet.localchain import repository

CONFIG = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def random_llama(folder: Path, seed: int = 5) -> Path:
    """Write it, once, with the demo model's tokenizer; 536 MB."""
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float()
    with torch.no_grad():  # sharp enough logits that no two are nearly equal
        model.lm_head.weight.mul_(8.0)
    model.save_pretrained(folder, max_shard_size="10GB")
    for name in _TOKENIZER:
        shutil.copy(repository() / "models" / "tallystick-demo" / name, folder / name)
    (folder / "LICENSE").write_text("cc0-1.0: random numbers\n")
    (folder / "complete").touch()
    return folder
