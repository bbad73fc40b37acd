"""The tasks over published one-layer spans, as nodes run them, against transformers on the whole checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harness import task_checkpoints as checkpoints
from harness.span_tasks import SpanTasks
from tallystick.tasks.backend import look_up
from tallystick.tasks.text2text import encode_decode

nightly = pytest.mark.nightly
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}
TEXT = "Tom Brown of Berlin sold the old mill. The lender keeps the stock"
CONTEXT = " ".join(checkpoints.SENTENCES[:4])
SETTINGS: list[dict[str, Any]] = [
    {}, {"num_beams": 1, "max_new_tokens": 8}, {"num_beams": 3, "max_length": 12, "no_repeat_ngram_size": 2},
]  # fmt: skip
RARE = {
    "early_stopping": "never", "length_penalty": 1.5, "min_length": 0, "min_new_tokens": 4, "repetition_penalty": 1.1,
    "encoder_repetition_penalty": 1.2, "remove_invalid_values": True,
}  # fmt: skip
PLAIN = {"forced_bos_token_id": None}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda folder: checkpoints.t5(folder), id="T5"),
        pytest.param(
            lambda folder: checkpoints.t5(folder, feed_forward_proj="gated-gelu", own_head=True), id="T5 1.1"
        ),
        pytest.param(
            lambda folder: checkpoints.t5(folder, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
            id="T5 1.1, tied", marks=nightly,
        ),
        pytest.param(lambda folder: checkpoints.summarizer(folder), id="BART"),
        pytest.param(lambda folder: checkpoints.summarizer(folder, **RARE), id="BART, rare settings", marks=nightly),
        pytest.param(lambda folder: checkpoints.summarizer(folder, "MBart", **PLAIN), id="mBART", marks=nightly),
        pytest.param(lambda folder: checkpoints.summarizer(folder, "M2M100", **PLAIN), id="M2M100", marks=nightly),
        pytest.param(
            lambda folder: checkpoints.summarizer(folder, "Pegasus", **PLAIN, num_beams=8, length_penalty=0.8),
            id="Pegasus", marks=nightly,
        ),
    ],
)  # fmt: skip
async def test_encoder_decoders_in_spans_generate_as_the_whole_does(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    """Token for token, and the score of the best beam; what the checkpoint's generation config says holds."""
    folder = make(tmp_path / "model")
    backend = SpanTasks(folder, tmp_path)
    whole = checkpoints.whole(folder, "AutoModelForSeq2SeqLM")
    tokenizer = checkpoints.fast_tokenizer(folder)
    served = await look_up(backend, "", ("logits",), "text")
    for text, settings in zip(checkpoints.SENTENCES, SETTINGS, strict=False):
        given = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            ids = torch.tensor([given])
            out = whole.generate(
                ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_scores=True, **settings
            )
        expected = out.sequences[0]
        (found, *_), _, _ = await encode_decode(backend, served, given, "off", None, dict(settings))
        assert list(found.ids) == expected[1:].tolist()
        if found.score is not None:
            assert found.score == pytest.approx(float(out.sequences_scores[0]), rel=5e-4), "logits of tens, fp32"
        (summary,) = await backend.summarization(text, **settings)
        assert summary == {"summary_text": tokenizer.decode(expected, skip_special_tokens=True)}


async def test_the_languages_of_an_mbart_are_marked_where_its_checkpoint_marks_them(tmp_path: Path) -> None:
    """mBART's own checkpoints begin with the target's code; those of mBART-50 begin with </s> and force the code."""
    codes = ["en_XX", "ro_RO"]
    tokenizer = checkpoints.metaspace(codes, "$A </s> en_XX")
    target = tokenizer.token_to_id("ro_RO")
    folder = checkpoints.summarizer(tmp_path / "model", "MBart", **PLAIN, decoder_start_token_id=target)
    tokenizer.save(str(folder / "tokenizer.json"))
    backend = SpanTasks(folder, tmp_path)
    whole, reference = checkpoints.whole(folder, "AutoModelForSeq2SeqLM"), checkpoints.fast_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(TEXT).ids])
    ids[0, -1] = target
    with torch.inference_mode():
        start = tokenizer.token_to_id("en_XX")
        out = whole.generate(ids, attention_mask=torch.ones_like(ids), decoder_start_token_id=start)
    (found,) = await backend.translation(TEXT, src_lang="ro_RO", tgt_lang="en_XX")
    assert found == {"translation_text": reference.decode(out[0], skip_special_tokens=True)}


def assert_close(found: Any, expected: Any) -> None:
    """Equal words and places; scores within 1e-5."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found["score"] == pytest.approx(float(expected["score"]), abs=1e-5)
        assert found | {"score": 0} == expected | {"score": 0}


def pipeline(task: str, auto_class: str, folder: Path) -> Any:
    model, tokenizer = checkpoints.whole(folder, auto_class), checkpoints.fast_tokenizer(folder)
    return transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize(
    "family, changes",
    [("Roberta", {"num_labels": 3, "problem_type": "multi_label_classification"}),
     ("Llama", {"num_labels": 1, "problem_type": "regression"}),
     pytest.param("DistilBert", {"num_labels": 1}, marks=nightly),
     pytest.param("Electra", {"num_labels": 3}, marks=nightly),
     pytest.param("Llama", {"num_labels": 3}, marks=nightly)],
    ids=str,
)  # fmt: skip
async def test_texts_are_classified_as_the_published_checkpoint_says(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    folder = checkpoints.classifier(tmp_path / "model", family, "SequenceClassification", **changes)
    backend = SpanTasks(folder, tmp_path)
    reference = pipeline("text-classification", "AutoModelForSequenceClassification", folder)
    assert_close(list(await backend.text_classification(TEXT)), reference(TEXT, top_k=None))
    for function in ("softmax", "sigmoid", "none"):
        found = await backend.text_classification(TEXT, function_to_apply=function)
        assert_close(list(found), reference(TEXT, top_k=None, function_to_apply=function))
    if family != "Llama":
        pair = reference([{"text": TEXT, "text_pair": "who keeps it?"}], top_k=None)[0]
        assert_close(list(await backend.text_classification(TEXT, pair="who keeps it?")), pair)


@pytest.mark.parametrize("family", ["Roberta", *(pytest.param(f, marks=nightly) for f in ("DistilBert", "Electra"))])
async def test_tokens_are_classified_in_spans(tmp_path: Path, family: str) -> None:
    folder = checkpoints.classifier(tmp_path / "model", family, "TokenClassification", id2label=LABELS, num_labels=4)
    backend = SpanTasks(folder, tmp_path)
    reference = pipeline("token-classification", "AutoModelForTokenClassification", folder)
    for strategy in ("none", "simple", "first", "average", "max"):
        for text in (TEXT, *checkpoints.SENTENCES):
            found = await backend.token_classification(text, aggregation_strategy=strategy)
            assert_close(list(found), reference(text, aggregation_strategy=strategy))


@pytest.mark.parametrize("family", ["DistilBert", *(pytest.param(f, marks=nightly) for f in ("Roberta", "Electra"))])
async def test_questions_are_answered_from_overlapping_windows_in_spans(tmp_path: Path, family: str) -> None:
    """The three best spans of all windows, by brute force over the whole model's scores."""
    folder = checkpoints.classifier(tmp_path / "model", family, "QuestionAnswering")
    backend = SpanTasks(folder, tmp_path)
    whole = checkpoints.whole(folder, "AutoModelForQuestionAnswering")
    windows = checkpoints.fast_tokenizer(folder)(
        "Who keeps it?", CONTEXT, truncation="only_second", max_length=48, stride=16, return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )  # fmt: skip
    best: dict[tuple[int, int], float] = {}
    for number, ids in enumerate(windows["input_ids"]):
        segments = {"token_type_ids": torch.tensor([windows["token_type_ids"][number]])} if family == "Electra" else {}
        with torch.inference_mode():
            out = whole(torch.tensor([ids]), **segments)
        inside = [index for index, text in enumerate(windows.sequence_ids(number)) if text == 1]
        starts = torch.softmax(out.start_logits[0, inside], 0).tolist()
        ends = torch.softmax(out.end_logits[0, inside], 0).tolist()
        places = windows["offset_mapping"][number]
        for first, start in enumerate(starts):
            for last in range(first, min(first + 15, len(inside))):
                place = places[inside[first]][0], places[inside[last]][1]
                best[place] = max(best.get(place, 0.0), start * ends[last])
    expected = sorted(best.items(), key=lambda item: -item[1])[:3]
    found = await backend.question_answering(
        "Who keeps it?", CONTEXT, max_seq_len=48, doc_stride=16, align_to_words=False, top_k=3
    )
    assert_close(
        list(found),
        [{"answer": CONTEXT[a:b], "score": score, "start": a, "end": b} for (a, b), score in expected],
    )
    assert backend.encodings == len(windows["input_ids"]) > 1
