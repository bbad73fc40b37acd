"""Speculation: the same tokens as without, the distribution, what is sent and what may be taken back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import checkpoints
from harness.in_memory import InMemory
from harness.in_process import InProcess, of_spans, of_table
from tallystick.speculation.local import DraftModel
from tallystick.speculation.lookup import PromptLookup
from tallystick.speculation.pace import Limits
from tallystick.speculation.steps import Speculation, Steps, named, room_behind
from tallystick.tokens import Tokens
from tallystick_devnet.demo import default_model
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.sampling import Sampling, draw
from tallystick_protocol.types import WINDOW

VOCAB = 4
TABLE = np.random.default_rng(3).normal(size=(VOCAB, VOCAB, VOCAB)).astype(np.float32) * 1.5
SAMPLINGS = [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=11)]


class Always:
    """Drafts what it is told to: the worst and the best there may be."""

    def __init__(self, tokens: Sequence[Any], first: int = 0) -> None:
        self._tokens, self._first = tokens, first

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        start = len(ids) - self._first
        return list(self._tokens[start : start + k])


class Likeliest:
    """Drafts the likeliest continuation by the table."""

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        text = list(ids)
        for _ in range(k):
            text.append(int(TABLE[text[-2], text[-1]].argmax()))
        return text[len(ids) :]


class Eager(Steps):
    """Drafts as many tokens as fit, every time."""

    def __init__(self, session: InProcess, sampling: Sampling, drafter: object, last: int, vocab: int) -> None:
        super().__init__(session, sampling, Speculation(drafter, Limits()), last, vocab)  # type: ignore[arg-type]
        self._pace.drafts = lambda room: min(room, 16)  # type: ignore[method-assign]


async def answer(steps: Steps, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    await steps.start(ids)
    while len(ids) < len(prompt) + count:
        ids += (await steps.decide(ids))[: len(prompt) + count - len(ids)]
        if len(ids) < len(prompt) + count:
            await steps.go_on(ids)
    await steps.stop(ids)
    return ids[len(prompt) :]


async def plain(session: InProcess, sampling: Sampling, prompt: list[int], count: int, vocab: int) -> list[int]:
    return await answer(Steps(session, sampling, Speculation(), len(prompt) + count, vocab), prompt, count)


# -- the same tokens


@pytest.fixture(scope="module")
def model() -> InMemory:
    size = {"vocab_size": 320, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return InMemory(transformers.LlamaForCausalLM, transformers.LlamaConfig(**size, **heads))


@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_the_tokens_are_those_of_plain_decoding_whatever_is_drafted(model: InMemory, sampling: Sampling) -> None:
    spans = model.cut(1)
    prompt = torch.randint(0, 320, (21,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = await plain(of_spans(spans), sampling, prompt, 48, 320)
    noise = np.random.default_rng(0)
    half = [token if noise.random() < 0.7 else int(noise.integers(320)) for token in expected]
    for drafter in (Always(expected, 21), Always(half, 21), Always([5] * 200), PromptLookup()):
        session = of_spans(spans)
        steps = Eager(session, sampling, drafter, len(prompt) + 48, 320)
        assert await answer(steps, prompt, 48) == expected
        if isinstance(drafter, Always) and drafter._tokens is expected:
            assert steps.accepted == steps.drafted and len(session.passes) < 9
        assert all(first // WINDOW == (last - 1) // WINDOW and last % WINDOW for first, last in session.taken_back)


@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_a_draft_model_that_is_the_model_is_nearly_always_right(tmp_path: Path, sampling: Sampling) -> None:
    folder = checkpoints.llama(tmp_path / "draft", num_hidden_layers=2)
    drafter = DraftModel(folder).coupled(sampling)
    whole = checkpoints.reference(folder, "LlamaForCausalLM")
    prompt = list(range(40, 60))

    def row(ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = whole(torch.tensor([ids])).logits[0, -1].numpy()
        return logits

    ids = list(prompt)
    hits = 0
    for _ in range(6):
        draft = drafter.propose(ids, 4)
        again = drafter.propose(ids[:-1], 2)  # taken back: begins anew
        assert len(draft) == 4 and len(again) == 2
        true: list[int] = []
        for _ in range(4):
            logits = row(ids + true)
            order = np.argsort(-logits, kind="stable")[:64]
            true.append(draw(order, logits[order], sampling, len(ids) + len(true)))
        hits += sum(itertools.takewhile(bool, (int(a == b) for a, b in zip(draft, true, strict=True))))
        ids += true[:3]
    assert hits >= 23  # the two programs round differently: a draw may fall between


class Timed:
    """A session whose passes take 20 ms and 0.5 ms for each row, by a clock of its own."""

    def __init__(self, session: InProcess) -> None:
        self._session = session
        self._due = self.now = 0.0

    @property
    def ids(self) -> list[int]:
        return self._session.ids

    async def feed(self, ids: list[int], want: Sequence[bool] | None = None) -> None:
        self._due = self.now + 0.02 + 0.0005 * len(ids)
        await self._session.feed(ids, want)

    async def result(self, position: int) -> bytes:
        self.now = max(self.now, self._due)
        return await self._session.result(position)

    async def drop(self, length: int) -> None:
        await self._session.drop(length)


async def test_a_text_that_quotes_itself_takes_a_third_of_the_passes(tmp_path: Path) -> None:
    """Counted, with the demo model, in "auto"."""
    text = "The function returns a list of names. The function returns a list of values. "
    prompt = Tokens(default_model() / "tokenizer.json").encode(2 * text + "The function returns")
    spans = checkpoints.published(default_model(), tmp_path).cut(3)
    vocab, count = spans[0].manifest.vocab, 90
    expected = await plain(of_spans(spans), Sampling(), prompt, count, vocab)
    session = of_spans(spans)
    timed = Timed(session)
    speculation = Speculation.of("auto", Sampling())
    steps = Steps(timed, Sampling(), speculation, len(prompt) + count, vocab, lambda: timed.now)
    assert await answer(steps, prompt, count) == expected
    passes, rows = len(session.passes) - 1, sum(session.passes[1:])
    assert passes <= count / 3, f"{passes} passes"
    assert rows <= 1.05 * count, f"{rows} rows"


# -- the distribution


async def test_the_distribution_of_whole_sequences_is_the_models() -> None:
    prompt, length, seeds = [1, 2, 1, 2], 3, 2500
    temperature = 0.9
    expected = np.empty((VOCAB,) * length)
    for sequence in np.ndindex(*expected.shape):
        chance, ids = 1.0, list(prompt)
        for token in sequence:
            weights = np.exp(TABLE[ids[-2], ids[-1]].astype(np.float64) / temperature)
            chance *= weights[token] / weights.sum()
            ids.append(token)
        expected[sequence] = chance
    counts = np.zeros_like(expected)
    accepted = 0
    for seed in range(seeds):
        steps = Eager(of_table(TABLE), Sampling(temperature=temperature, seed=seed), Likeliest(), 7, VOCAB)
        counts[tuple(await answer(steps, prompt, length))] += 1
        accepted += steps.accepted
    assert accepted > seeds / 2
    likely = expected * seeds > 5
    found = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum()) * seeds
    chi_square = float(((found - wanted) ** 2 / wanted).sum())
    degrees = len(wanted) - 1
    assert chi_square < degrees + 3.1 * (2 * degrees) ** 0.5 + 4  # about one in a thousand


@given(st.data())
@settings(max_examples=60, deadline=None)
async def test_any_drafter_any_seed_and_any_prompt_give_the_plain_tokens(data: st.DataObject) -> None:
    prompt = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40))
    sampling = Sampling(temperature=data.draw(st.sampled_from([0.0, 0.5, 2.0])), seed=data.draw(st.integers(0, 99)))
    count = data.draw(st.integers(1, 80))
    odd = st.one_of(st.integers(-2, VOCAB + 2), st.just(2.5))
    drafts = data.draw(st.lists(odd, max_size=len(prompt) + count + 20))
    expected = await plain(of_table(TABLE), sampling, prompt, count, VOCAB)
    session = of_table(TABLE)
    assert await answer(Eager(session, sampling, Always(drafts), len(prompt) + count, VOCAB), prompt, count) == expected
    assert all(last % WINDOW and first // WINDOW == last // WINDOW for first, last in session.taken_back)
    assert len(session.ids) <= len(prompt) + count


# -- pieces


def test_no_draft_ends_a_window() -> None:
    for position in range(3 * WINDOW):
        drafts = range(position + 1, position + 1 + room_behind(position))
        assert all(at % WINDOW != WINDOW - 1 for at in drafts)
        assert (position + 1 + len(drafts)) % WINDOW == WINDOW - 1  # and one more would


def brute_lookup(ids: list[int], k: int) -> list[int]:
    """The same, looked for from the beginning every time."""
    for length in range(min(8, len(ids)), 1, -1):
        ends = [end for end in range(length, len(ids)) if ids[end - length : end] == ids[-length:]]
        if ends:
            text = list(ids)
            for at in range(ends[-1], ends[-1] + k):
                text.append(text[at])
            return text[len(ids) :]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 20), st.data())
def test_lookup_finds_the_last_occurrence_of_the_longest_suffix(ids: list[int], k: int, data: st.DataObject) -> None:
    lookup = PromptLookup()
    for end in sorted(data.draw(st.sets(st.integers(1, len(ids)), max_size=8))):
        lookup.propose(ids[:end], 1)
    if data.draw(st.booleans()):  # some are taken back, and go on otherwise
        ids = ids[: len(ids) // 2 + 1] + data.draw(st.lists(st.integers(0, 3), max_size=9))
    assert lookup.propose(ids, k) == brute_lookup(ids, k)


def test_words_and_folders_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    for nonsense in ("sometimes", 3, None):
        with pytest.raises(ConfigError, match="not auto, lookup, off or a drafter"):
            Speculation.of(nonsense, Sampling())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no draft model in"):
        named(str(tmp_path))
    assert named("auto") == "auto" and Speculation.of("off", Sampling()).drafter is None
