"""Text generation: a prompt or a conversation goes on, until an end, a stop string or the length that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tallystick.tasks.backend import Answers, Backend, Served, TaskAnswers, look_up
from tallystick.tasks.decoding import Continuation, Order, Scored, generate
from tallystick.tasks.options import checked
from tallystick.tasks.prompts import Message, prompt_ids
from tallystick.tasks.settings import Generation, settle
from tallystick.tokens import TextStream, Tokens
from tallystick.verdict import Policy
from tallystick_protocol.errors import ConfigError

MAX_STOPS = 64
MAX_TOP = 256


@checked
async def text_generation(
    backend: Backend,
    inputs: str | Sequence[Message] | list[int],
    *,
    model: str = "",
    stop: Sequence[str] | str = (),
    return_full_text: bool = False,
    details: bool = False,
    decoder_input_details: bool = False,
    top_n_tokens: int = 0,
    truncate: int | None = None,
    verify: Policy = "audit",
    **settings: Any,
) -> TaskAnswers:
    """[{"generated_text", "details"?}], num_return_sequences of them. settings: see `tasks.settings.settle`.

    stop: the answer ends with the first of these that it contains. details: {"finish_reason" ("length",
    "eos_token" or "stop_sequence"), "generated_tokens", "seed", "prefill", "tokens"}; each token is {"id", "text",
    "logprob", "special"}, and with top_n_tokens the likeliest ones of each position are there, too. truncate: keep
    so many tokens of the prompt, the last ones. Raises ConfigError, ContextLengthExceeded, and what sessions raise.
    """
    served = await look_up(backend, model, ("logits",), "text")
    manifest = served.manifest
    if not manifest.causal or manifest.encoder_layers:
        raise ConfigError(f"{manifest.name} does not continue text: use fill_mask, summarization or translation")
    prompt = await prompt_ids(served, inputs)
    if truncate is not None:
        prompt = prompt[-max(truncate, 1) :]
    chosen = settle(manifest, len(prompt), **settings)
    told = details or decoder_input_details or top_n_tokens > 0
    if told and chosen.num_beams > 1:
        raise ConfigError("details are given of one sequence: use num_beams=1")
    if not 0 <= top_n_tokens <= MAX_TOP:
        raise ConfigError(f"top_n_tokens={top_n_tokens} is not from 0 to {MAX_TOP}")
    order = Order(
        prompt,
        chosen,
        encoder_ids=tuple(prompt),
        ended=stopper(served.tokens, prompt, stop),
        logprobs=top_n_tokens if told else None,
        prefill=decoder_input_details,
    )
    found, route, verdict = await generate(backend, served, order, verify)
    results = []
    for continuation in found:
        text = generated_text(served.tokens, prompt, continuation.ids)
        result: dict[str, Any] = {"generated_text": text}
        if return_full_text:
            result["generated_text"] = (inputs if isinstance(inputs, str) else served.tokens.decode(prompt)) + text
        if told:
            result["details"] = _details(served, chosen, continuation)
        results.append(result)
    return Answers(results, route, verdict)


def stopper(tokens: Tokens, prompt: Sequence[int], stop: Sequence[str] | str) -> Callable[[Sequence[int]], bool]:
    """Whether the text of some new ids contains one of the stop strings. Raises ConfigError for empty or many ones."""
    if isinstance(stop, str):
        stop = [stop]
    if len(stop) > MAX_STOPS or not all(isinstance(text, str) and 0 < len(text) <= 1000 for text in stop):
        raise ConfigError(f"stop: at most {MAX_STOPS} strings of 1 to 1000 characters")
    if not stop:
        return lambda _: False
    # only the last tokens can have completed a stop string; one has at least one character for four bytes
    reach = 4 * max(map(len, stop)) + 4

    def stopped(ids: Sequence[int]) -> bool:
        text = generated_text(tokens, prompt[-4:], ids[-reach:])
        return any(wanted in text for wanted in stop)

    return stopped


def generated_text(tokens: Tokens, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that new ids add to a prompt's; spaces between the two are the new text's."""
    stream = TextStream(tokens, list(prompt))
    stream.extend(list(ids))
    return stream.text


def _details(served: Served, settings: Generation, found: Continuation) -> dict[str, Any]:
    reason = "length"
    if found.ids[-1] in settings.eos:
        reason = "eos_token"
    elif found.stopped:
        reason = "stop_sequence"
    details: dict[str, Any] = {
        "finish_reason": reason,
        "generated_tokens": len(found.ids),
        "seed": settings.sampling.seed if settings.sampling.temperature > 0 else None,
        "prefill": [_told(served.tokens, token) for token in found.prefill],
        "tokens": [
            _told(served.tokens, token) | {"special": served.tokens.is_special(token.id)} for token in found.tokens
        ],
    }
    if any(token.top for token in found.tokens):
        details["top_tokens"] = [
            [
                {"id": id, "text": served.tokens.decode([id], special=True), "logprob": logprob,
                 "special": served.tokens.is_special(id)}
                for id, logprob in token.top
            ]
            for token in found.tokens
        ]  # fmt: skip
    return details


def _told(tokens: Tokens, token: Scored) -> dict[str, Any]:
    logprob = None if math.isnan(token.logprob) else token.logprob
    return {"id": token.id, "text": tokens.decode([token.id], special=True), "logprob": logprob}
