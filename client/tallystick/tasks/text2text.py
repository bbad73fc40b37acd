"""Summarization and translation: with encoder-decoder models, and by instruction with causal ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tallystick.routing.candidates import Candidate
from tallystick.tasks.backend import Answers, Backend, Served, TaskAnswers, check_length, check_rows, look_up, merge
from tallystick.tasks.decoding import Continuation, Order, generate
from tallystick.tasks.languages import codes, source_ids, target_code
from tallystick.tasks.options import checked
from tallystick.tasks.passes import longest
from tallystick.tasks.prompts import chat_ids, summarize_instruction, translate_instruction
from tallystick.tasks.settings import DEFAULT_NEW_TOKENS, settle, with_forced_bos
from tallystick.tasks.text_generation import generated_text
from tallystick.verdict import Policy, Verdict
from tallystick_protocol.errors import ConfigError

INSTRUCTED_TOKENS = 256
"""New tokens at most when an instructed model answers and nobody said how many."""


@dataclass(frozen=True, slots=True)
class _Source:
    """What is to be turned into something else. ids: for an encoder; instruction: for a causal model."""

    ids: list[int]
    instruction: str
    forced_bos: int | None = None


@checked
async def summarization(
    backend: Backend, text: str, *, model: str = "", prefix: str = "", truncate: bool = False,
    verify: Policy = "audit", **settings: Any,
) -> TaskAnswers:  # fmt: skip
    """[{"summary_text"}], num_return_sequences of them. settings: see `tasks.settings.settle`.

    prefix: what the model was trained to see before a text ("summarize: " for T5). truncate: leave away what is beyond
    the model's positions. Raises ConfigError, ContextLengthExceeded, and what sessions raise.
    """
    served = await look_up(backend, model, ("logits",), "text")
    ids = served.tokens.encode(prefix + text) if served.manifest.encoder_layers else []
    source = _Source(_shortened(served, ids, truncate), summarize_instruction(text))
    found, route, verdict = await _answer(backend, served, source, verify, settings)
    return Answers([{"summary_text": text} for text in found], route, verdict)


@checked
async def translation(
    backend: Backend, text: str, *, model: str = "", src_lang: str | None = None, tgt_lang: str | None = None,
    prefix: str = "", truncate: bool = False, verify: Policy = "audit", **settings: Any,
) -> TaskAnswers:  # fmt: skip
    """[{"translation_text"}], num_return_sequences of them. settings: see `tasks.settings.settle`.

    src_lang, tgt_lang: codes of the model's own ("eng_Latn", "en_XX", "en"); models of one pair need none, and
    instructed causal models take any words. prefix: "translate English to German: " for T5. Raises as `summarization`.
    """
    served = await look_up(backend, model, ("logits",), "text")
    if not served.manifest.encoder_layers:
        if tgt_lang is None:
            raise ConfigError("into which language? set tgt_lang")
        source = _Source([], translate_instruction(text, src_lang, tgt_lang))
    else:
        ids = source_ids(served.tokens, prefix + text, src_lang, tgt_lang)
        code = target_code(served.tokens, tgt_lang)
        if code is not None and served.manifest.generation.get("decoder_start") in codes(served.tokens).values():
            settings.setdefault("decoder_start_token_id", code)  # mBART's first checkpoints begin with the language
            code = None
        source = _Source(_shortened(served, ids, truncate), "", code)
    found, route, verdict = await _answer(backend, served, source, verify, settings)
    return Answers([{"translation_text": text} for text in found], route, verdict)


async def _answer(
    backend: Backend, served: Served, source: _Source, verify: Policy, settings: dict[str, Any]
) -> tuple[list[str], list[Candidate], Verdict]:
    if not served.manifest.encoder_layers:
        return await _instructed(backend, served, source, verify, settings)
    found, route, verdict = await encode_decode(backend, served, source.ids, verify, source.forced_bos, settings)
    return [served.tokens.decode(list(continuation.ids)) for continuation in found], route, verdict


async def encode_decode(
    backend: Backend, served: Served, ids: list[int], verify: Policy, forced_bos: int | None, settings: dict[str, Any]
) -> tuple[list[Continuation], list[Candidate], Verdict]:
    """The source's ids through the encoder; its last hidden states are the memory of the decoder, which generates."""
    manifest = served.manifest
    check_length(manifest, len(ids))
    own = manifest.generation.get("decoder_start", manifest.generation.get("bos"))
    start = settings.pop("decoder_start_token_id", own)
    if type(start) is not int or not 0 <= start < manifest.vocab:
        raise ConfigError(f"{manifest.name} names no decoder start: set decoder_start_token_id")
    chosen = with_forced_bos(settle(manifest, 1, **settings), forced_bos)
    encoded = await backend.run(served.id, ids, verify=verify)
    memory = check_rows(encoded.rows, (len(ids), manifest.width))
    order = Order([start], chosen, memory=memory, encoder_ids=tuple(ids))
    found, route, verdict = await generate(backend, served, order, verify)
    return found, [*encoded.route, *route], merge([encoded.verdict, verdict])


async def _instructed(
    backend: Backend, served: Served, source: _Source, verify: Policy, settings: dict[str, Any]
) -> tuple[list[str], list[Candidate], Verdict]:
    """A causal model is asked in words, by its chat template."""
    if not served.manifest.causal:
        raise ConfigError(f"{served.manifest.name} is a model for {served.manifest.task}: it writes no text")
    prompt = await chat_ids(served, [{"role": "user", "content": source.instruction}])
    if "max_length" not in settings:
        room = max(served.manifest.max_length - len(prompt), DEFAULT_NEW_TOKENS)
        settings.setdefault("max_new_tokens", min(INSTRUCTED_TOKENS, room))
    order = Order(prompt, settle(served.manifest, len(prompt), **settings), encoder_ids=tuple(prompt))
    found, route, verdict = await generate(backend, served, order, verify)
    return [generated_text(served.tokens, prompt, each.ids).strip() for each in found], route, verdict


def _shortened(served: Served, ids: list[int], truncate: bool) -> list[int]:
    """With `truncate`, ids within the model's positions; what ends them (special tokens) stays."""
    limit = longest(served)
    if not truncate or len(ids) <= limit:
        return ids
    tail = [token for token in ids[-2:] if served.tokens.is_special(token)]
    return [*ids[: limit - len(tail)], *tail]
