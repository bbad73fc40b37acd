"""transformers' own generate() over spans gives the ids that it gives over the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

from harness import checkpoints
from harness.sdk_backend import SpansBackend, served_llama
from tallystick.torch.caches import SessionCache
from tallystick.torch.causal_lm import NetworkModelForCausalLM
from tallystick.torch.contrastive import contrastive_search
from tallystick_protocol.errors import ConfigError, CorruptResult

PROMPT = torch.arange(5, 30)[None] * 11 % 300
PAD = 2


@pytest.fixture
def pair() -> tuple[Any, NetworkModelForCausalLM, SpansBackend]:
    """The whole model, and the same one served in three spans."""
    return served_llama()


def both(pair: Any, seed: int = 0, prompt: torch.Tensor = PROMPT, **options: Any) -> tuple[Any, Any]:
    whole, served, _ = pair
    found = []
    for model in (whole, served):
        torch.manual_seed(seed)
        found.append(model.generate(prompt, max_new_tokens=12, pad_token_id=PAD, **options))
    return found[0], found[1]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "greedy without a cache": {"do_sample": False, "use_cache": False},
    "greedy with a chunked prefill": {"do_sample": False, "prefill_chunk_size": 7},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_ids_are_those_of_the_whole_model(pair: Any, way: str) -> None:
    options = dict(WAYS[way])
    expected, found = both(pair, **options)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
def test_a_batch_with_left_padding_gives_the_same_ids(pair: Any, way: str) -> None:
    prompt = torch.cat([PROMPT, PROMPT.flip(1)])
    mask = torch.ones_like(prompt)
    mask[1, :6], prompt[1, :6] = 0, PAD
    expected, found = both(pair, prompt=prompt, attention_mask=mask, **WAYS[way])
    assert torch.equal(expected, found)


def test_an_assistant_drafts_and_the_ids_stay_the_same(pair: Any, tmp_path: Any) -> None:
    whole = pair[0]
    drafter = checkpoints.reference(checkpoints.llama(tmp_path, num_hidden_layers=1), "LlamaForCausalLM")
    for options in ({"do_sample": False}, {"do_sample": True}):
        expected, found = both(pair, assistant_model=drafter, **options)
        assert torch.equal(expected, found)
    assert torch.equal(both(pair, assistant_model=whole, do_sample=False)[1], both(pair, do_sample=False)[0])


def test_streamers_and_stopping_criteria_are_heard(pair: Any) -> None:
    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(str(int(one)) for one in ids)

    class Enough:
        def __call__(self, ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            return torch.full((len(ids),), ids.shape[1] >= 30)

    streamer = TextIteratorStreamer(Words(), skip_prompt=True)  # type: ignore[arg-type]
    found = pair[1].generate(
        PROMPT, max_new_tokens=12, do_sample=False, streamer=streamer, stopping_criteria=[Enough()], pad_token_id=PAD
    )
    assert found.shape[1] == 30
    assert "".join(streamer).split() == [str(int(one)) for one in found[0, 25:]]


def test_stop_strings_end_an_answer(pair: Any, tmp_path: Path) -> None:
    checkpoints.add_companions(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    _, whole = both(pair, do_sample=True)
    word = next(text for text in map(tokenizer.decode, whole[0, 27:35]) if text.isascii() and text.isprintable())
    expected, found = both(pair, do_sample=True, stop_strings=[word], tokenizer=tokenizer)
    assert torch.equal(expected, found) and found.shape[1] < whole.shape[1]


def naive_contrastive(model: Any, ids: torch.Tensor, alpha: float, k: int, steps: int) -> torch.Tensor:
    """The formula of Su et al. 2022, token by token, everything computed anew."""
    for _ in range(steps):
        out = model(ids, output_hidden_states=True)
        context = F.normalize(out.hidden_states[-1][0], dim=-1)
        probabilities, candidates = out.logits[0, -1].softmax(-1).topk(k)
        scores = []
        for probability, candidate in zip(probabilities, candidates, strict=True):
            states = model(torch.cat([ids, candidate[None, None]], 1), output_hidden_states=True).hidden_states[-1]
            degeneration = (context @ F.normalize(states[0, -1], dim=-1)).max()
            scores.append((1 - alpha) * probability - alpha * degeneration)
        ids = torch.cat([ids, candidates[int(torch.stack(scores).argmax())][None, None]], 1)
    return ids


def test_contrastive_search_is_the_formula(pair: Any) -> None:
    whole, served, _ = pair
    with torch.no_grad():
        expected = naive_contrastive(whole, PROMPT, 0.6, 4, 8)
    options = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(served.generate(PROMPT, **options), expected)
    local = whole.generate(PROMPT, custom_generate=contrastive_search, **options)
    assert torch.equal(local, expected)


def test_scores_and_hidden_states_come_along(pair: Any) -> None:
    expected, found = both(
        pair, do_sample=False, return_dict_in_generate=True, output_logits=True, output_hidden_states=True
    )
    assert torch.equal(expected.sequences, found.sequences)
    for step, (theirs, mine) in enumerate(zip(expected.hidden_states, found.hidden_states, strict=True)):
        assert len(theirs) == len(mine), step
        for one, other in zip(theirs, mine, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for theirs, mine in zip(expected.logits, found.logits, strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-4)


def test_a_conversation_goes_on_from_its_cache(pair: Any) -> None:
    whole, served, backend = pair
    first = served.generate(
        PROMPT, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, pad_token_id=PAD, eos_token_id=None
    )
    assert isinstance(first.past_key_values, SessionCache)
    longer = torch.cat([first.sequences, PROMPT[:, :5]], dim=1)
    before = backend.rows_fed
    found = served.generate(
        longer, past_key_values=first.past_key_values, max_new_tokens=6, do_sample=False, pad_token_id=PAD
    )
    assert torch.equal(found, whole.generate(longer, max_new_tokens=6, do_sample=False, pad_token_id=PAD))
    assert backend.rows_fed - before < 2 * longer.shape[1]
    first.past_key_values.settle()
    assert backend.opened[-1].finished and backend.opened[-1].left


def test_every_session_is_finished_and_left(pair: Any) -> None:
    _, _, backend = pair
    both(pair, num_beams=3, do_sample=False)
    assert all(decoder.finished and decoder.left for decoder in backend.opened)


def test_generation_begins_anew_when_a_node_lied_and_was_caught(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, served, backend = pair
    expected, _ = both(pair, seed=5, do_sample=True)
    honest = backend.decoder
    liars = []

    def decoder(max_length: int, beams: int) -> Any:
        made = honest(max_length, beams)
        if not liars:
            liars.append(made)
            made.wrong_from = made.caught_at = None
            made.wrong_from, real_finish = 26, made.finish

            async def finish() -> None:
                made.caught_at = 26
                await real_finish()

            made.finish = finish
        return made

    monkeypatch.setattr(backend, "decoder", decoder)
    torch.manual_seed(5)
    found = served.generate(PROMPT, max_new_tokens=12, pad_token_id=PAD, do_sample=True)
    assert liars[0].caught_at == 26
    assert torch.equal(found, expected)
    liars.clear()
    with pytest.raises(CorruptResult, match="again"):
        streamer = TextIteratorStreamer(None, skip_prompt=True)  # type: ignore[arg-type]
        streamer.put = lambda _: None  # type: ignore[method-assign]
        served.generate(PROMPT, max_new_tokens=12, pad_token_id=PAD, do_sample=True, streamer=streamer)


def test_a_forward_is_made_anew_when_a_node_lied(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, served, backend = pair
    honest, liars = backend.decoder, []

    def decoder(max_length: int, beams: int) -> Any:
        made = honest(max_length, beams)
        if not liars:
            liars.append(made)
            made.wrong_from, real_finish = 3, made.finish

            async def finish() -> None:
                made.caught_at = 3
                await real_finish()

            made.finish = finish
        return made

    monkeypatch.setattr(backend, "decoder", decoder)
    with torch.no_grad():
        torch.testing.assert_close(served(PROMPT).logits, whole(PROMPT).logits, atol=1e-4, rtol=1e-4)
    assert liars[0].caught_at == 3 and liars[0].left


def test_goes_on_when_a_node_was_caught_before_anything_was_wrong(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = both(pair, seed=5, do_sample=True)
    _, served, backend = pair
    honest, caught = backend.decoder, []

    def decoder(max_length: int, beams: int) -> Any:
        made = honest(max_length, beams)
        if not caught:
            made.caught_at = 30
            caught.append(made)
        return made

    monkeypatch.setattr(backend, "decoder", decoder)
    torch.manual_seed(5)
    found = served.generate(PROMPT, max_new_tokens=12, pad_token_id=PAD, do_sample=True)
    assert caught[0].left and torch.equal(found, expected)


def test_forward_is_the_whole_models(pair: Any) -> None:
    whole, served, _ = pair
    prompt = torch.cat([PROMPT, PROMPT.flip(1)])
    mask = torch.ones_like(prompt)
    mask[1, :6] = 0
    labels = prompt.masked_fill(mask == 0, -100)
    labels[1, 6] = -100  # what follows padding is predicted by nothing
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = whole(prompt, attention_mask=mask, position_ids=positions, labels=labels)
        found = served(prompt, attention_mask=mask, position_ids=positions, labels=labels, use_cache=False)
    torch.testing.assert_close(found.loss, expected.loss)
    shown = mask.bool()
    torch.testing.assert_close(found.logits[shown], expected.logits[shown], atol=1e-4, rtol=1e-4)
    assert found.past_key_values is None


@pytest.mark.parametrize(
    "given",
    [
        {"output_attentions": True},
        {"token_type_ids": PROMPT},
        {"position_ids": torch.arange(1, 26)[None]},
        {"attention_mask": torch.ones(1, 3)},
        {"logits_to_keep": torch.tensor([1])},
        {"inputs_embeds": torch.zeros(1, 25, 72)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_arguments_without_a_meaning_are_refused(pair: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError), torch.no_grad():
        pair[1](PROMPT, **given)
