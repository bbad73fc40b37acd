"""Each task's answer is that of transformers' pipeline, model or generate() on the same checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram

from harness import task_checkpoints as checkpoints
from harness.local_backend import LocalBackend, manifest_of
from tallystick.tasks.languages import source_ids
from tallystick.tokens import Tokens
from tallystick_protocol.errors import ConfigError, ContextLengthExceeded, CorruptResult
from tallystick_protocol.manifest import Pooling

TEXTS = ["Tom Brown of Berlin sold the stick", "the two halves bear notches, and each party keeps one half. naïve 東京"]
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
LONG = " ".join(checkpoints.SENTENCES)


def served(folder: Path, auto_class: str, task: str, output: str, **options: Any) -> LocalBackend:
    model = checkpoints.whole(folder, auto_class)
    return LocalBackend(model, folder, manifest_of(model, folder, task, output, **options))


def pipeline(backend: LocalBackend, folder: Path, task: str) -> Any:
    return transformers.pipeline(task, model=backend.whole, tokenizer=checkpoints.fast_tokenizer(folder), device="cpu")


def assert_close(found: Any, expected: Any) -> None:
    """Equal shapes, words and places; scores within 1e-5."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, dict):
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, float | np.floating):
        assert found == pytest.approx(float(expected), abs=1e-5)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalBackend, Path]:
    folder = checkpoints.bert(tmp_path_factory.mktemp("mlm"), "MaskedLM")
    return served(folder, "AutoModelForMaskedLM", "fill-mask", "logits"), folder


@pytest.mark.parametrize(
    "text, options",
    [("the [MASK] of the stick", {}), ("the [MASK] of [MASK] mill", {"top_k": 3}),
     ("[MASK] keeps the stock", {"targets": ["tom", "stick", "zebra"]})],
    ids=["one mask", "two masks", "targets"],
)  # fmt: skip
async def test_fill_mask_is_the_pipelines(masked: Any, text: str, options: dict[str, Any]) -> None:
    backend, folder = masked
    expected = pipeline(backend, folder, "fill-mask")(text, **options)
    assert_close(list(await backend.fill_mask(text, **options)), expected)


async def test_a_text_without_a_mask_and_a_model_without_one_are_told(masked: Any) -> None:
    with pytest.raises(ConfigError, match=r"has no \[MASK\]"):
        await masked[0].fill_mask("nothing is missing")
    with pytest.raises(ConfigError, match="does not continue text"):
        await masked[0].text_generation("Once")
    with pytest.raises(ConfigError, match="fill-mask"):
        await masked[0].text_classification("good?")


async def test_berts_round_trip_encode_predict_decode(masked: Any) -> None:
    """The plain use of a BERT: ids, a prediction for every position, text."""
    backend, folder = masked
    tokenizer = checkpoints.fast_tokenizer(folder)
    text = "the borrower keeps the foil"
    ids = await backend.encode(text)
    assert ids == tokenizer(text)["input_ids"]
    (rows,) = await backend.predictions(ids)
    with torch.inference_mode():
        expected = backend.whole(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    best = rows.argmax(-1).tolist()
    assert await backend.decode(best) == tokenizer.decode(best, skip_special_tokens=True)
    assert await backend.decode(ids) == "the borrower keeps the foil"


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression", None])
async def test_text_classification_is_the_pipelines(tmp_path: Path, problem: str | None) -> None:
    labels = {0: "score"} if problem == "regression" else {0: "bad", 1: "so-so", 2: "good"}
    folder = checkpoints.bert(
        tmp_path, "SequenceClassification", problem_type=problem, num_labels=len(labels), id2label=labels
    )
    backend = served(folder, "AutoModelForSequenceClassification", "text-classification", "label")
    reference = pipeline(backend, folder, "text-classification")
    for text in TEXTS:
        assert_close(list(await backend.text_classification(text)), reference(text, top_k=None))
    pair = reference([{"text": TEXTS[0], "text_pair": TEXTS[1]}], top_k=None)[0]
    assert_close(list(await backend.text_classification(TEXTS[0], pair=TEXTS[1])), pair)
    assert pair != reference(TEXTS[0], top_k=None), "segments and the second text count"


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalBackend, Path]:
    folder = checkpoints.bert(
        tmp_path_factory.mktemp("ner"), "TokenClassification", num_labels=len(LABELS), id2label=LABELS, seed=2
    )
    return served(folder, "AutoModelForTokenClassification", "token-classification", "scores"), folder


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
async def test_token_classification_is_the_pipelines(tagger: Any, strategy: str) -> None:
    backend, folder = tagger
    reference = pipeline(backend, folder, "token-classification")
    for text in [*TEXTS, *checkpoints.SENTENCES]:
        found = await backend.token_classification(text, aggregation_strategy=strategy)
        assert_close(list(found), reference(text, aggregation_strategy=strategy))
        lowered = text.lower()
        for entity in found:
            if strategy == "none" and "##" not in entity["word"] and "[UNK]" not in entity["word"]:
                assert lowered[entity["start"] : entity["end"]].replace("ï", "i").replace("é", "e") == entity["word"]


async def test_a_long_text_is_tagged_in_windows_as_by_the_pipeline(tagger: Any) -> None:
    backend, folder = tagger
    reference = transformers.pipeline(
        "token-classification", model=backend.whole, tokenizer=checkpoints.fast_tokenizer(folder),
        aggregation_strategy="simple", stride=16,
    )  # fmt: skip
    before = len(backend.passes)
    found = await backend.token_classification(LONG, aggregation_strategy="simple", stride=16)
    assert_close(list(found), reference(LONG))
    assert len(backend.passes) - before >= 3


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalBackend, Path]:
    folder = checkpoints.bert(tmp_path_factory.mktemp("qa"), "QuestionAnswering", seed=4)
    return served(folder, "AutoModelForQuestionAnswering", "question-answering", "scores"), folder


def answers_by_hand(
    backend: LocalBackend, folder: Path, question: str, context: str, length: int, stride: int, longest: int,
    empty: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every span of every window by brute force over transformers' logits and its tokenizer's windows."""
    tokenizer = checkpoints.fast_tokenizer(folder)
    windows = tokenizer(
        question, context, truncation="only_second", max_length=length, stride=stride, return_overflowing_tokens=True,
        return_offsets_mapping=True, padding=False,
    )  # fmt: skip
    found, none = [], 1.0
    for number, ids in enumerate(windows["input_ids"]):
        with torch.inference_mode():
            out = backend.whole(torch.tensor([ids]), token_type_ids=torch.tensor([windows["token_type_ids"][number]]))
        inside = [i for i, text in enumerate(windows.sequence_ids(number)) if text == 1]
        counted = [0, *inside] if empty else inside
        starts = torch.softmax(out.start_logits[0, counted].double(), 0).tolist()
        ends = torch.softmax(out.end_logits[0, counted].double(), 0).tolist()
        if empty:
            none = min(none, starts.pop(0) * ends.pop(0))
        for i, first in enumerate(inside):
            for j in range(i, min(i + longest, len(inside))):
                offsets = windows["offset_mapping"][number]
                start, end = offsets[first][0], offsets[inside[j]][1]
                found.append({"answer": context[start:end], "score": starts[i] * ends[j], "start": start, "end": end})
    if empty:
        found.append({"answer": "", "score": none, "start": 0, "end": 0})
    unique: dict[tuple[int, int], dict[str, Any]] = {}
    for entry in sorted(found, key=lambda each: -each["score"]):
        unique.setdefault((entry["start"], entry["end"]), entry)
    return list(unique.values())


@pytest.mark.parametrize("empty", [False, True], ids=["always an answer", "or none"])
async def test_question_answering_finds_the_spans_that_the_models_scores_name(reader: Any, empty: bool) -> None:
    backend, folder = reader
    question = "Who keeps the stock?"
    for context, length, stride in ((checkpoints.SENTENCES[5], 128, 16), (LONG, 40, 12)):
        found = await backend.question_answering(
            question, context, max_seq_len=length, doc_stride=stride, max_answer_len=6, top_k=5,
            handle_impossible_answer=empty, align_to_words=False,
        )  # fmt: skip
        limit = min(length, 64)
        expected = answers_by_hand(backend, folder, question, context, limit, stride, 6, empty)[:5]
        assert_close(list(found), expected)
        for entry in found:
            assert context[entry["start"] : entry["end"]] == entry["answer"]


async def test_an_answer_is_made_of_whole_words(reader: Any) -> None:
    backend, _ = reader
    context = checkpoints.SENTENCES[4]
    for entry in await backend.question_answering("When?", context, top_k=8):
        before, after = context[: entry["start"]], context[entry["end"] :]
        assert not (before[-1:].isalnum() and entry["answer"][0].isalnum())
        assert not (after[:1].isalnum() and entry["answer"][-1].isalnum())


async def test_a_window_without_room_for_the_context_is_told(reader: Any) -> None:
    with pytest.raises(ConfigError, match="longer windows"):
        await reader[0].question_answering("who " * 60, "somebody", max_seq_len=32)


@pytest.mark.parametrize("pooling", [Pooling("mean", True), Pooling("cls", False)], ids=str)
async def test_features_are_the_models_states_pooled_as_the_checkpoint_says(tmp_path: Path, pooling: Pooling) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**checkpoints.BERT_SMALL))
    folder = checkpoints.save(model, tmp_path, checkpoints.wordpiece(), checkpoints.BERT_TOKENS)
    backend = served(folder, "AutoModel", "feature-extraction", "hidden", pooling=pooling)
    expected = np.array(pipeline(backend, folder, "feature-extraction")(TEXTS[0])[0])
    (states,) = await backend.feature_extraction(TEXTS[0], pooling="none")
    np.testing.assert_allclose(states, expected, atol=1e-5)
    (vector,) = await backend.feature_extraction(TEXTS[0])
    pooled = expected.mean(0) if pooling.mode == "mean" else expected[0]
    np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled) if pooling.normalize else pooled, atol=1e-5)
    (short,) = await backend.feature_extraction(TEXTS[0], dimensions=8, normalize=True)
    assert short.shape == (8,) and np.linalg.norm(short) == pytest.approx(1.0, abs=1e-6)
    (cut,) = await backend.feature_extraction(LONG, pooling="none", truncate=True)
    assert len(cut) == 64, "as many tokens as the tokenizer's files allow"


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalBackend, Path]:
    folder = checkpoints.llama(tmp_path_factory.mktemp("llama"), seed=3)
    return served(folder, "AutoModelForCausalLM", "text-generation", "logits"), folder


def continued(backend: LocalBackend, folder: Path, ids: list[int], **settings: Any) -> str:
    tokenizer = checkpoints.fast_tokenizer(folder)
    given = torch.tensor([ids])
    with torch.inference_mode():
        out = backend.whole.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, tokenizer=tokenizer, **settings
        )
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


async def test_text_generation_continues_as_transformers_does(writer: Any) -> None:
    backend, folder = writer
    for prompt in ("The split tally", "Anna Meyer of"):
        ids = await backend.encode(prompt)
        for settings in ({"max_new_tokens": 12}, {"max_new_tokens": 12, "num_beams": 3}, {"repetition_penalty": 1.3}):
            (found,) = await backend.text_generation(prompt, return_full_text=True, **settings)
            assert found == {"generated_text": continued(backend, folder, ids, **settings)}


async def test_generation_ends_with_a_stop_string(writer: Any) -> None:
    backend, folder = writer
    ids = await backend.encode("The stick")
    whole = continued(backend, folder, ids, max_new_tokens=30)
    stop = whole[len("The stick") :][7:10]
    (found,) = await backend.text_generation(
        "The stick", stop=[stop], max_new_tokens=30, return_full_text=True, details=True
    )
    assert found["generated_text"] == continued(backend, folder, ids, max_new_tokens=30, stop_strings=[stop])
    assert stop in found["generated_text"] and len(found["generated_text"]) < len(whole)
    assert found["details"]["finish_reason"] == "stop_sequence"


async def test_details_tell_each_tokens_log_probability(writer: Any) -> None:
    backend, _ = writer
    (found,) = await backend.text_generation(
        "The stick", max_new_tokens=6, details=True, decoder_input_details=True, top_n_tokens=3
    )
    details = found["details"]
    ids = [token["id"] for token in (*details["prefill"], *details["tokens"])]
    with torch.inference_mode():
        logprobs = torch.log_softmax(backend.whole(torch.tensor([ids])).logits[0], -1)
    assert details["prefill"][0]["logprob"] is None
    told = [token["logprob"] for token in (*details["prefill"][1:], *details["tokens"])]
    np.testing.assert_allclose(told, [float(logprobs[i, token]) for i, token in enumerate(ids[1:])], atol=1e-5)
    assert details["generated_tokens"] == len(details["tokens"]) == len(details["top_tokens"])
    for token, likeliest in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(likeliest) == 3 and likeliest[0]["id"] == token["id"], "greedy takes the likeliest"
    assert set(details["tokens"][0]) == {"id", "text", "logprob", "special"}


async def test_a_conversation_goes_on_by_the_models_template(writer: Any) -> None:
    backend, folder = writer
    messages = [{"role": "user", "content": "Who keeps the stock?"}]
    tokenizer = checkpoints.fast_tokenizer(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    (found,) = await backend.text_generation(messages, max_new_tokens=8, return_full_text=True)
    assert found["generated_text"] == continued(backend, folder, ids, max_new_tokens=8)


async def test_an_instructed_model_translates_and_summarises(writer: Any) -> None:
    backend, folder = writer
    tokenizer = checkpoints.fast_tokenizer(folder)
    asked = "Translate the following text from English to German. Answer with the translation only.\n\nthe mill"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=False
    )
    (found,) = await backend.translation("the mill", src_lang="English", tgt_lang="German", max_new_tokens=8)
    whole = continued(backend, folder, ids, max_new_tokens=8)
    assert whole.endswith(found["translation_text"]) and set(found) == {"translation_text"}
    (summary,) = await backend.summarization("the mill", max_new_tokens=4)
    assert set(summary) == {"summary_text"}
    with pytest.raises(ConfigError, match="tgt_lang"):
        await backend.translation("the mill")


async def test_translation_and_summary_are_those_of_the_whole_encoder_decoder(tmp_path: Path) -> None:
    folder = checkpoints.marian(tmp_path, seed=5)
    backend = served(folder, "AutoModelForSeq2SeqLM", "text2text-generation", "logits")
    tokenizer = checkpoints.fast_tokenizer(folder)
    for text in checkpoints.SENTENCES[:4]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            out = backend.whole.generate(ids, attention_mask=torch.ones_like(ids))
        expected = tokenizer.decode(out[0], skip_special_tokens=True)
        assert list(await backend.translation(text)) == [{"translation_text": expected}]
        assert list(await backend.summarization(text)) == [{"summary_text": expected}]


def test_a_language_that_a_model_of_several_has_no_mark_for_is_refused(tmp_path: Path) -> None:
    checkpoints.metaspace([">>fra<<", ">>deu<<"], "$A </s>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"no language 'spa'; the model has 2: >>deu<<, >>fra<<"):
        source_ids(Tokens(tmp_path / "tokenizer.json"), "a", None, "spa")


async def test_what_is_no_text_and_what_leaves_no_room_is_said(tmp_path: Path) -> None:
    backend = served(checkpoints.llama(tmp_path), "AutoModelForCausalLM", "text-generation", "logits")
    limit = (await backend.model(""))[1].max_length
    for wrong in (5, None, b"text"):
        with pytest.raises(ConfigError, match="inputs="):
            await backend.text_generation(wrong)
    with pytest.raises(ConfigError, match="max_length=2 leaves no room"):
        await backend.text_generation("the mill by the river", max_length=2)
    with pytest.raises(ContextLengthExceeded):
        await backend.text_generation("mill " * limit)
    with pytest.raises(ConfigError, match="temperature"):
        await backend.text_generation("the mill", temperature=-1.0)
    with pytest.raises(ConfigError, match="1000000000"):
        await backend.decode([10**9])


@pytest.mark.parametrize("source, target", [("eng_Latn", "fra_Latn"), ("deu_Latn", "eng_Latn")])
async def test_a_multilingual_model_is_told_both_languages(tmp_path: Path, source: str, target: str) -> None:
    folder = checkpoints.multilingual(tmp_path)
    backend = served(folder, "AutoModelForSeq2SeqLM", "text2text-generation", "logits")
    tokenizer = checkpoints.fast_tokenizer(folder)
    text = checkpoints.SENTENCES[0]
    code = {name: tokenizer.convert_tokens_to_ids(name) for name in (source, target)}
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[code[source], *plain, 2]])
    with torch.inference_mode():
        out = backend.whole.generate(ids, attention_mask=torch.ones_like(ids), forced_bos_token_id=code[target])
    (found,) = await backend.translation(text, src_lang=source, tgt_lang=target)
    assert out[0, 1] == code[target]
    assert found == {"translation_text": tokenizer.decode(out[0], skip_special_tokens=True)}
    with pytest.raises(ConfigError, match="3: deu_Latn"):
        await backend.translation(text, src_lang=source, tgt_lang="tlh_Latn")


@pytest.mark.parametrize(
    "added, template, source, target, expected",
    [(["en_XX", "ro_RO"], "$A </s> en_XX", "ro_RO", "en_XX", "a </s> ro_RO"),
     (["__en__", "__fr__"], "__en__ $A </s>", "fr", "en", "__fr__ a </s>"),
     (["__en__", "__fr__"], "$A </s>", "fr", "en", "__fr__ a </s>"),
     ([">>fra<<"], "$A </s>", None, "fra", ">>fra<< a </s>"),
     ([], "$A </s>", "en", "fr", "a </s>")],
    ids=["mBART", "M2M100", "M2M100 without a default", "Marian", "one pair"],
)  # fmt: skip
def test_languages_are_marked_as_each_familys_tokenizer_does_it(
    tmp_path: Path, added: list[str], template: str, source: str | None, target: str, expected: str
) -> None:
    tokenizer = checkpoints.metaspace(added, template)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = Tokens(tmp_path / "tokenizer.json")
    found = [tokens.token_of(token).replace("▁", "") for token in source_ids(tokens, "a", source, target)]
    assert [token for token in found if token] == expected.split()


@pytest.mark.parametrize("harm", ["too few rows", "not finite", "too narrow"])
async def test_rows_that_are_not_what_was_asked_for_are_corrupt(masked: Any, harm: str) -> None:
    """They come from strangers."""
    backend, _ = masked

    class Harmful(LocalBackend):
        async def run(self, *arguments: Any, **options: Any) -> Any:
            done = await backend.run(*arguments, **options)
            rows = done.rows.copy()
            rows[0, 0] = np.nan if harm == "not finite" else rows[0, 0]
            rows = rows[:-1] if harm == "too few rows" else rows[:, :-1] if harm == "too narrow" else rows
            return replace(done, rows=rows)

    harmful = Harmful(backend.whole, masked[1], backend.manifest)
    with pytest.raises(CorruptResult, match="finite numbers"):
        await harmful.fill_mask("the [MASK] of the stick")


@pytest.mark.parametrize("cleans", [True, False])
def test_text_is_cleaned_up_as_the_checkpoints_settings_say(tmp_path: Path, cleans: bool) -> None:
    words = ["▁I", "▁do", "▁n't", "▁know", "▁,", "▁it", "▁'s", "▁ok", "▁."]
    tokenizer = Tokenizer(Unigram([("<unk>", 0.0), *((word, -1.0) for word in words)], 0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": cleans}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = list(range(1, len(words) + 1))
    expected = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path).decode(ids)
    assert Tokens(tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json").decode(ids) == expected
    assert expected == ("I don't know, it's ok." if cleans else "I do n't know , it 's ok .")
