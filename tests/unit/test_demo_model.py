"""The demo checkpoint is small, loads as any Llama does, predicts as well as its card says and writes English words."""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM

MODELS = Path(__file__).resolve().parents[2] / "models"
DEMO = MODELS / "tallystick-demo"
PROMPTS = ("The function returns", "If the file does not exist,", "This module provides")

spec = importlib.util.spec_from_file_location("prose", MODELS / "prose.py")
prose = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prose)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def held_out() -> list[str]:
    return (DEMO / "heldout.txt").read_text().rstrip("\n").split(prose.SEPARATOR)


@cache
def standard_words() -> frozenset[str]:
    """The words in the docstrings, comments and help pages of the standard library's own modules."""
    paths = [*prose.STDLIB.glob("*.py"), prose.STDLIB / "pydoc_data" / "topics.py"]
    return frozenset(word for path in paths for text in prose.texts(path) for word in words(text))


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_has_three_to_seven_million_parameters(model):
    assert 3_000_000 <= model.num_parameters() <= 7_000_000


def test_keeps_its_bfloat16_weights_below_16_mb():
    path = DEMO / "model.safetensors"
    assert path.stat().st_size < 16_000_000
    with safe_open(path, framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118


def test_has_the_shape_that_spans_and_kernels_expect():
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 6
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == config["head_dim"] % 32 == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]


@pytest.mark.parametrize("text", ["Hello, world.", "  two\n\n\tlines, 1024 naïve 数字 🧮 ", "x=[1,2]; <b>"])
def test_tokenizer_gives_a_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_every_text_begins_with_bos(tokenizer):
    ids = tokenizer("")["input_ids"]
    assert ids == [tokenizer.bos_token_id]
    assert tokenizer("some text")["input_ids"][0] == tokenizer.bos_token_id
    assert {tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token} == {"<pad>", "<bos>", "<eos>"}


@torch.no_grad()
def test_predicts_held_out_text_as_well_as_its_card_says(model, tokenizer):
    claimed = re.search(r"^\| `heldout.txt` \| ([\d.]+) \|", (DEMO / "README.md").read_text(), re.MULTILINE)
    assert claimed is not None
    nats, num_tokens = 0.0, 0
    for text in held_out():
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        num_tokens += ids.shape[1] - 1
    assert num_tokens > 1_000
    assert nats / num_tokens == pytest.approx(float(claimed[1]), abs=0.01)


@torch.no_grad()
def test_prefers_sentences_to_their_words_shuffled(model, tokenizer):
    def loss(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return model(ids, labels=ids).loss.item()

    for text in held_out()[:5]:
        assert loss(text) < loss(" ".join(sorted(text.split())))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_writes_words_that_exist(model, tokenizer, prompt):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    greedy = model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
    written = words(tokenizer.decode(greedy, skip_special_tokens=True))
    assert len(written) >= 5
    assert sum(word in standard_words() for word in written) >= 0.8 * len(written)
