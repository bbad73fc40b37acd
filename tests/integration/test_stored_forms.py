"""Models as stored: a GGUF file, int8 matrices, bf16 products, each served by nodes and held to transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from conftest import Running
from harness import checkpoints
from tallystick import AsyncClient
from tallystick_devnet.bench.gguf_file import llama_gguf
from tallystick_devnet.localnet import parts

pytestmark = pytest.mark.nightly
Form = Literal["gguf", "int8", "bf16w"]
SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3}
PROMPT = "A tally stick was an"
TOKENS = 24
TOLERANCE: dict[Form, float] = {"gguf": 1e-4, "int8": 1e-4, "bf16w": 3e-2}
"""Of a log-probability. Under bf16w a sum that lies between two bf16 values may be rounded to either."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.llama(tmp_path_factory.mktemp("forms") / "checkpoint", seed=7, **SIZES)


@pytest.fixture(scope="module")
def served(running: Running, folder: Path) -> dict[Form, str]:
    """Model ids. Three spans each, two nodes a span, so that every row can be recomputed."""
    file = llama_gguf(folder, folder.parent / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    published = {
        "gguf": running.net.publish(file, "form gguf"),
        "int8": running.net.publish(folder, "form int8", quantize="int8"),
        "bf16w": running.net.publish(folder, "form bf16w", numerics="bf16w"),
    }
    running.net.prepare(6 * len(published))
    nodes = [
        running.net.add_node(model, span)
        for model, manifest in published.values()
        for span in parts(manifest.whole, 3) * 2
    ]
    for node in nodes:
        node.wait()
    return {form: "0x" + model.hex() for form, (model, _) in published.items()}  # type: ignore[misc]


@pytest.mark.parametrize("form", ["gguf", "int8", "bf16w"])
async def test_the_networks_tokens_are_those_of_the_dequantised_checkpoint(
    running: Running, served: dict[Form, str], folder: Path, form: Form
) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        found = await client.text_generation(
            PROMPT, model=served[form], max_new_tokens=TOKENS, details=True, verify="full"
        )
    verdict = found.verdict
    assert verdict.failed == 0 and verdict.passed == verdict.receipts >= 3
    assert len(found.route) == 3 and {hop.node for hop in found.route} <= verdict.paid.keys()
    assert all(paid > 0 for paid in verdict.paid.values())
    told = found[0]["details"]["tokens"]
    prompt = prompt_ids(folder)
    ids = [token["id"] for token in told]
    logits = await asyncio.to_thread(logits_of_the_whole, folder, form, prompt + ids)
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    expected = rows[torch.arange(len(ids)), torch.tensor(ids)]
    assert len(ids) == TOKENS or ids[-1] == 1
    assert float((expected - torch.tensor([token["logprob"] for token in told])).abs().max()) < TOLERANCE[form]
    assert float((rows.amax(-1) - expected).max()) < TOLERANCE[form], "each token is the likeliest one"


def prompt_ids(folder: Path) -> list[int]:
    ids: list[int] = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).encode(PROMPT)
    return ids


def logits_of_the_whole(folder: Path, form: Form, ids: list[int]) -> torch.Tensor:
    """(len(ids), vocab): of transformers' own model with the weights that the form leaves."""
    model = checkpoints.reference(folder, "LlamaForCausalLM")
    if form == "gguf":
        tensors = load_gguf_checkpoint(str(folder.parent / "tiny.gguf"), return_tensors=True, model_to_load=model)
        model.load_state_dict(tensors["tensors"])
    for name, module in model.named_modules():
        if form == "int8" and ".layers." in name and isinstance(module, nn.Linear) and module.weight.numel() >= 2048:
            module.weight.data = torch.from_numpy(rounded_to_int8(module.weight.detach().numpy()))
        elif form == "bf16w" and isinstance(module, nn.Linear):
            module.forward = bf16_product(module)
        elif form == "bf16w" and isinstance(module, nn.Embedding):
            module.weight.data = module.weight.data.bfloat16().float()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


def rounded_to_int8(weight: np.ndarray) -> np.ndarray:
    """docs/publishing.md: for 128 values of a row at a time, s = max|w| / 127, q = round(w / s) to even, q x s."""
    out = np.empty_like(weight)
    for start in range(0, weight.shape[1], 128):
        group = weight[:, start : start + 128]
        scale = np.abs(group).max(axis=1, keepdims=True) / np.float32(127)
        out[:, start : start + 128] = np.rint(group / scale) * scale
    return out


def bf16_product(module: nn.Linear) -> Any:
    """docs/numerics.md: weights and inputs rounded to bf16, the sum taken in fp64 and rounded to bf16."""
    weight = module.weight.detach().bfloat16().double()
    return lambda x: F.linear(x.bfloat16().double(), weight).bfloat16().float()
