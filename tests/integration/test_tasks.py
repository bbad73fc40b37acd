"""Every task on a running network, against transformers on the whole model."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from conftest import Running
from harness import original_transformer as original
from harness import task_checkpoints as checkpoints
from harness.watched import Watched
from tallystick import AsyncClient, Client
from tallystick.cli import main
from tallystick.decoding import Decoder
from tallystick_devnet.localnet import LocalNode
from tallystick_protocol.content.fetch import fetch_file
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Span

LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}
EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "Tom Brown of Berlin sold the old mill"


@dataclass(frozen=True, slots=True)
class Served:
    """A tiny checkpoint that is published and served by nodes of its own."""

    id: str
    folder: Path
    manifest: Manifest
    nodes: list[LocalNode]

    def kill(self, address: str) -> None:
        next(node for node in self.nodes if node.address == address).process.kill()

    def whole(self, auto_class: str) -> Any:
        return checkpoints.whole(self.folder, auto_class)

    def pipeline(self, task: str, auto_class: str) -> Any:
        tokenizer = checkpoints.fast_tokenizer(self.folder)
        return transformers.pipeline(task, model=self.whole(auto_class), tokenizer=tokenizer, device="cpu")


SPANS = {
    "mask": [Span(0, 2), Span(2, 3)],
    "text": [Span(0, 3)],
    "answer": [Span(0, 3)],
    "marian": [Span(0, 2), Span(2, 4), Span(0, 2), Span(2, 4)],
}
"""A node for each; two for those of the Marian model, which go away."""


@pytest.fixture(scope="module")
def models(running: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """Three BERTs with a head each, and a Marian model."""
    folders = {name: tmp_path_factory.mktemp(name) for name in SPANS}
    checkpoints.bert(folders["mask"], "MaskedLM")
    checkpoints.bert(folders["text"], "SequenceClassification", num_labels=3)
    checkpoints.bert(folders["answer"], "QuestionAnswering")
    checkpoints.marian(folders["marian"], seed=5)
    return serve(running, folders, SPANS)


@pytest.fixture(scope="module")
def tagger(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A BERT that names entities, cut in two."""
    folder = tmp_path_factory.mktemp("tokens")
    checkpoints.bert(folder, "TokenClassification", num_labels=len(LABELS), id2label=LABELS)
    return serve(running, {"tokens": folder}, {"tokens": SPANS["mask"]})["tokens"]


def serve(running: Running, folders: dict[str, Path], spans: dict[str, list[Span]]) -> dict[str, Served]:
    """Publish checkpoints and start their nodes, which load while the next one is published."""
    served, nodes = {}, []
    running.net.prepare(sum(map(len, spans.values())))
    for name, folder in folders.items():
        model, manifest = running.net.publish(folder, f"tiny {name}")
        own = [running.net.add_node(model, span) for span in spans[name]]
        served[name] = Served("0x" + model.hex(), folder, manifest, own)
        nodes += own
    for node in nodes:
        node.wait()
    return served


@pytest.fixture(scope="module")
async def client(running: Running) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(running.key, running.net.settings()) as client:
        yield client


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same words and places; scores within 1e-5."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        scores = one["score"], float(other["score"])
        assert abs(scores[0] - scores[1]) < 1e-5
        assert one | {"score": 0} == other | {"score": 0}


async def test_fill_mask_over_two_nodes_is_the_pipelines(client: AsyncClient, models: dict[str, Served]) -> None:
    served = models["mask"]
    found = await client.fill_mask("the [MASK] of the stick", model=served.id, verify="off")
    reference = await asyncio.to_thread(served.pipeline, "fill-mask", "AutoModelForMaskedLM")
    assert_close(found, reference("the [MASK] of the stick"))
    assert [hop.span for hop in found.route] == [Span(0, 2), Span(2, 3)]
    assert all(paid > 0 for paid in found.verdict.paid.values()) and len(found.verdict.paid) == 2


async def test_berts_round_trip_over_the_network(client: AsyncClient, models: dict[str, Served]) -> None:
    served = models["mask"]
    ids = await client.encode(TEXT, model=served.id)
    (rows,) = await client.predictions(ids, model=served.id, verify="off")
    whole = await asyncio.to_thread(served.whole, "AutoModelForMaskedLM")
    with torch.inference_mode():
        expected = whole(torch.tensor([ids])).logits[0].numpy()
    assert float(np.abs(rows - expected).max()) < 1e-5
    best = expected.argmax(-1).tolist()
    text = await client.decode(rows.argmax(-1).tolist(), model=served.id)
    assert text == checkpoints.fast_tokenizer(served.folder).decode(best, skip_special_tokens=True)


async def test_texts_and_pairs_are_classified(client: AsyncClient, models: dict[str, Served]) -> None:
    served = models["text"]
    reference = await asyncio.to_thread(
        served.pipeline, "text-classification", "AutoModelForSequenceClassification"
    )
    single = await client.text_classification(TEXT, model=served.id, verify="off")
    assert_close(single, reference(TEXT, top_k=None))
    pair = await client.text_classification(TEXT, pair="who keeps one half?", model=served.id, verify="off")
    expected = reference([{"text": TEXT, "text_pair": "who keeps one half?"}], top_k=None)[0]
    assert_close(pair, expected)
    assert abs(pair[0]["score"] - single[0]["score"]) > 1e-4, "the second text counts"


@pytest.mark.nightly
async def test_tokens_are_classified_over_two_nodes(client: AsyncClient, tagger: Served) -> None:
    served = tagger
    found = await client.token_classification(
        TEXT, model=served.id, aggregation_strategy="simple", ignore_labels=(), verify="off"
    )
    reference = await asyncio.to_thread(served.pipeline, "token-classification", "AutoModelForTokenClassification")
    assert_close(found, reference(TEXT, aggregation_strategy="simple", ignore_labels=[]))
    assert all(TEXT[entity["start"] : entity["end"]].lower() == entity["word"] for entity in found)


async def test_a_question_is_answered_from_overlapping_windows(client: AsyncClient, models: dict[str, Served]) -> None:
    served = models["answer"]
    context = " ".join(checkpoints.SENTENCES[:3])
    found = await client.question_answering(
        "who keeps it?", context, model=served.id, max_seq_len=48, doc_stride=16, align_to_words=False, verify="off"
    )
    (best,) = found
    assert context[best["start"] : best["end"]] == best["answer"]
    score, start, end = await asyncio.to_thread(best_by_hand, served, "who keeps it?", context)
    assert (best["start"], best["end"]) == (start, end)
    assert best["score"] == pytest.approx(score, abs=1e-5)
    assert len(found.verdict.paid) == 1 and found.verdict.receipts >= 2, "several windows"


def best_by_hand(served: Served, question: str, context: str) -> tuple[float, int, int]:
    """The best span of at most 15 tokens in any window, by brute force over transformers' scores."""
    model = served.whole("AutoModelForQuestionAnswering")
    windows = checkpoints.fast_tokenizer(served.folder)(
        question, context, truncation="only_second", max_length=48, stride=16, return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )  # fmt: skip
    spans = []
    for number, ids in enumerate(windows["input_ids"]):
        types = torch.tensor([windows["token_type_ids"][number]])
        with torch.inference_mode():
            out = model(torch.tensor([ids]), token_type_ids=types)
        inside = [i for i, text in enumerate(windows.sequence_ids(number)) if text == 1]
        starts = torch.softmax(out.start_logits[0, inside], 0).tolist()
        ends = torch.softmax(out.end_logits[0, inside], 0).tolist()
        offsets = windows["offset_mapping"][number]
        spans += [
            (starts[i] * ends[j], offsets[inside[i]][0], offsets[inside[j]][1])
            for i in range(len(inside))
            for j in range(i, min(i + 15, len(inside)))
        ]
    return max(spans, key=lambda span: span[0])


async def test_a_served_marian_model_computes_the_original_transformers_formulas(
    client: AsyncClient, running: Running, models: dict[str, Served], tmp_path: Path
) -> None:
    """Sinusoidal positions, scaled dot-product attention, feed-forward: in NumPy, with weights out of the pieces."""
    served = models["marian"]
    weights: original.Weights = {}
    for piece in served.manifest.pieces:
        path = tmp_path / piece.name
        await fetch_file(piece.cid, path, [running.net.source], store=LocalStore(tmp_path / "s"), max_bytes=piece.bytes)
        weights |= {name: tensor.astype(np.float64) for name, tensor in load_file(path).items()}
    table = next(name for name in weights if "shared" in name or "embed_tokens" in name or "lm_head" in name)
    weights["model.shared.weight"] = weights[table]  # one table embeds, on both sides, and makes the logits
    ids = await client.encode(checkpoints.SENTENCES[1], model=served.id)
    encoded = await client.run(served.id, ids, verify="off")
    memory = original.encode(weights, ids, layers=2, heads=4)
    np.testing.assert_allclose(encoded.rows, memory, atol=2e-5)
    target = [0, 7, 9, 30]
    async with client.decoder(served.id, max_length=8, dense=True, memory=encoded.rows, verify="off") as decoder:
        await decoder.feed(target, want="all")
        rows = [await decoder.row(position) for position in range(len(target))]
        await decoder.finish()
    logits = original.decode(weights, target, encoded.rows.astype(np.float64), layers=2, heads=4)
    np.testing.assert_allclose(np.stack(rows), logits, atol=5e-5)  # of values up to 4, fp32 against fp64


async def test_a_translation_by_beams_is_generates_though_nodes_of_both_stacks_go_away(
    running: Running, models: dict[str, Served]
) -> None:
    """The encoder's is dead when the text comes; a decoder's dies among its beams: the memory is sent again."""
    served, victims = models["marian"], []

    def strike(decoder: Decoder) -> None:
        victims.append(decoder.route[0].node)
        served.kill(decoder.route[0].node)

    text = checkpoints.SENTENCES[0]
    async with Watched(running.key, running.net.settings()) as client:
        client.watch(4, strike)
        record, manifest = await client.model(served.id)
        _, route = await client.planning.route(record, manifest, Span(0, 2))
        served.kill(route[0].node)
        found = await client.translation(text, model=served.id, verify="off", num_beams=3, max_length=8)
    tokenizer = checkpoints.fast_tokenizer(served.folder)
    whole = await asyncio.to_thread(served.whole, "AutoModelForSeq2SeqLM")
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        out = whole.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, max_length=8)
    assert list(found) == [{"translation_text": tokenizer.decode(out[0], skip_special_tokens=True)}]
    assert [hop.span for hop in found.route] == [Span(0, 2), Span(2, 4)]
    assert len(victims) == 1 and set(victims) <= {node for node, _, _ in found.verdict.replaced}
    assert not {route[0].node, *victims} & {hop.node for hop in found.route}


async def test_the_causal_model_generates_by_beams_with_rules_over_three_hops(
    client: AsyncClient, running: Running
) -> None:
    settings = {"num_beams": 3, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "length_penalty": 0.5}
    prompt = "The function returns"
    (found,) = await client.text_generation(
        prompt, model=running.id, max_new_tokens=5, return_full_text=True, verify="off", **settings
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(running.checkpoint, local_files_only=True)
    ids = torch.tensor([await client.encode(prompt, model=running.id)])
    whole = await asyncio.to_thread(checkpoints.whole, running.checkpoint, "AutoModelForCausalLM")
    with torch.inference_mode():
        out = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, **settings)
    assert found["generated_text"] == prompt + tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


async def test_the_client_that_waits_has_the_tasks_too(running: Running, models: dict[str, Served]) -> None:
    def classify() -> list[dict[str, Any]]:
        with Client(running.key, running.net.settings()) as waiting:
            return waiting.text_classification(TEXT, model=models["text"].id, top_k=1, verify="off")

    (best,) = await asyncio.to_thread(classify)
    assert set(best) == {"label", "score"} and best["label"].startswith("LABEL_")


async def test_tallystick_run_prints_a_tasks_result(
    running: Running, models: dict[str, Served], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *command_line(running), "run", "text-classification", "--model", models["text"].id, "--verify", "off",
        "--set", "top_k=1", "--json", TEXT,
    ]  # fmt: skip
    assert await asyncio.to_thread(main, arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["results"][0]) == {"label", "score"} and len(told["results"]) == 1
    assert [hop["layers"] for hop in told["route"]] == [[0, 3]] and told["paid_wei"] > 0
    assert await asyncio.to_thread(main, [*arguments[:-1], "--set", "top=1", TEXT]) == 1
    assert "has no option ['top']" in capsys.readouterr().err


@pytest.fixture(scope="module")
def encoder(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A BERT without a head."""
    folder = tmp_path_factory.mktemp("encoder")
    checkpoints.bert_without_a_head(folder)
    return serve(running, {"encoder": folder}, {"encoder": SPANS["text"]})["encoder"]


@pytest.fixture
def of_tasks(running: Running, models: dict[str, Served], tagger: Served, encoder: Served) -> dict[str, str]:
    """A served model for each task."""
    return {
        "text-generation": running.id, "fill-mask": models["mask"].id, "text-classification": models["text"].id,
        "token-classification": tagger.id, "question-answering": models["answer"].id,
        "summarization": models["marian"].id, "translation": models["marian"].id, "feature-extraction": encoder.id,
    }  # fmt: skip


@pytest.mark.nightly
async def test_features_over_the_network_are_the_pipelines(client: AsyncClient, encoder: Served) -> None:
    (rows,) = await client.feature_extraction(TEXT, model=encoder.id, pooling="none", verify="off")
    pipeline = await asyncio.to_thread(encoder.pipeline, "feature-extraction", "AutoModel")
    expected = np.asarray(pipeline(TEXT)[0])
    assert float(np.abs(rows - expected).max()) < 1e-5
    (mean,) = await client.feature_extraction(TEXT, model=encoder.id, normalize=False, verify="off")
    assert float(np.abs(mean - expected.mean(axis=0)).max()) < 1e-5


@pytest.mark.nightly
async def test_every_task_is_a_command(
    running: Running, of_tasks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    running.revive()
    for task, model in of_tasks.items():
        arguments = [*command_line(running), "run", task, "--model", model, "--verify", "off", "--json"]
        if task in ("text-generation", "summarization", "translation"):
            arguments += ["--set", "max_new_tokens=6"]
        texts = {"fill-mask": ["the [MASK] of it"], "question-answering": ["who sold it?", TEXT]}.get(task, [TEXT])
        assert await asyncio.to_thread(main, [*arguments, *texts]) == 0, task
        told = json.loads(capsys.readouterr().out)
        assert told["results"] and told["paid_wei"] > 0, task


@pytest.mark.nightly
async def test_the_tour_of_the_examples_does_every_task(running: Running, of_tasks: dict[str, str]) -> None:
    running.revive()
    tour = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / "tasks_tour.py"), *(f"{task}={model}" for task, model in of_tasks.items()),
        env=os.environ | environment(running), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    told, errors = await asyncio.wait_for(tour.communicate(), 240)
    assert tour.returncode == 0, errors.decode()
    lines = dict(line.split(" ", 1) for line in told.decode().splitlines())
    assert list(lines) == list(of_tasks)
    assert all(json.loads(line) for line in lines.values())


def environment(running: Running) -> dict[str, str]:
    """What the examples read."""
    local = running.net.chain
    return {
        "TALLYSTICK_RPC": local.rpc, "TALLYSTICK_BOOK": str(local.book), "TALLYSTICK_KEY": str(running.keystore),
        "TALLYSTICK_PASSWORD_FILE": str(running.keystore.parent / "password"),
        "TALLYSTICK_SOURCES": running.net.source,
    }  # fmt: skip


def command_line(running: Running) -> list[str]:
    """What every call of `tallystick` begins with."""
    local = running.net.chain
    return [
        "--rpc", local.rpc, "--book", str(local.book), "--key", str(running.keystore),
        "--password-file", str(running.keystore.parent / "password"), "--source", running.net.source,
    ]  # fmt: skip
