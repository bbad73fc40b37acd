"""The model alone, in one process: canonical execution next to transformers, without nodes, wires or payments.

`python -m tallystick_devnet.bench.model [--model PATH] [--threads N] [--json]`. Pairs are interleaved; ratios are of
the two runs of a pair. Decoding is greedy behind a prompt of random ids; sessions in shared calls differ in length.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from tallystick_devnet.bench.checkpoint import random_llama
from tallystick_model.anatomy import dissect
from tallystick_model.config import checkpoint_config
from tallystick_model.loader import assemble, vocabulary
from tallystick_model.publishing.trial import trial_manifest
from tallystick_model.segments import Cache, Segment
from tallystick_model.skeleton import build_skeleton, named_weights
from tallystick_model.span import SpanModel
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.types import Span

Figures = dict[str, float | None]
COUNTS = (1, 4, 16, 32)
PREFILLS = (64, 512)
_LENGTH = 1024


def model_figures(
    folder: Path, *, threads: int = 1, pairs: int = 7, tokens: int = 32, prompt: int = 100,
    say: Callable[[str], None] = lambda text: None,
) -> Figures:  # fmt: skip
    """Tokens per second of one process, and ratios to transformers' in fp32, for a checkpoint's folder.

    decode_*: one session; ragged<n>_*: n sessions in shared calls, aggregate; prefill<n>_*: rows of one prompt.
    """
    torch.set_num_threads(threads)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    spans = {numerics: span_of(whole, numerics) for numerics in ("fp32", "bf16w")}
    figures: Figures = {f"planned_{name}": float(span.prepare()) for name, span in spans.items()}
    for span in spans.values():
        for join in span.joins():
            join()
    coins = random.Random(1)
    vocab = vocabulary(whole.config)

    def ids(count: int) -> torch.Tensor:
        return torch.tensor([coins.randrange(2, vocab) for _ in range(count)])

    found: dict[str, list[float]] = {}

    def note(name: str, rate: float, base: float | None = None) -> None:
        found.setdefault(f"{name}_tokens_per_s", []).append(rate)
        if base is not None:
            found.setdefault(f"{name}_vs_transformers", []).append(rate / base)

    for pair in range(pairs):
        text = ids(prompt)
        theirs, expected = _generate(whole, text, tokens)
        note("decode_transformers", theirs)
        for numerics, span in spans.items():
            ours, got = _decode(span, [text], tokens)
            note(f"decode_{numerics}", ours, theirs)
            if numerics == "fp32" and got[0] != expected:
                say("  other tokens than transformers': two logits were nearly equal")
        for count in COUNTS:
            texts = [ids(prompt // 2 + coins.randrange(prompt)) for _ in range(count)]
            note(f"ragged{count}", _decode(spans["fp32"], texts, tokens // 2)[0])
        for count in PREFILLS:
            text = ids(count)
            theirs = count / _seconds(lambda text=text: _stock_prefill(whole, text))  # type: ignore[misc]
            note(f"prefill{count}_transformers", theirs)
            for numerics, span in spans.items():
                ours = count / _seconds(lambda span=span, text=text: _prefill(span, text))  # type: ignore[misc]
                note(f"prefill{count}_{numerics}", ours, theirs)
        say(f"  pair {pair + 1}: " + ", ".join(f"{name} {rates[-1]:.1f}" for name, rates in found.items()))
    for count in COUNTS[1:]:
        one = found["ragged1_tokens_per_s"]
        many = found[f"ragged{count}_tokens_per_s"]
        found[f"ragged{count}_vs_1"] = [m / o for m, o in zip(many, one, strict=True)]
    for name, values in found.items():
        figures[name] = statistics.median(values)
        if "_vs_" in name:
            figures[f"{name}_low"], figures[f"{name}_high"] = min(values), max(values)
    return figures


def span_of(whole: Any, numerics: Numerics) -> SpanModel:
    """All layers of a causal model that transformers has loaded, to be run canonically."""
    values, architecture = checkpoint_config(whole.config.to_dict()), type(whole).__name__
    skeleton = build_skeleton(values, architecture)
    anatomy = dissect(skeleton)
    manifest = trial_manifest(values, architecture, (), anatomy, vocabulary(skeleton.config))
    manifest = replace(manifest, numerics=numerics, max_length=_LENGTH)
    weights = named_weights(whole)

    def source(piece: str, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
        return {name: weights[name].detach().clone() for name in wanted}

    span = Span(0, len(anatomy.layers))
    return SpanModel(manifest, span, assemble(skeleton, anatomy, span, source, "canonical", numerics), "canonical")


def _generate(whole: Any, text: torch.Tensor, tokens: int) -> tuple[float, list[int]]:
    """Tokens per second behind the prompt: what `generate` does at each step, and no less."""

    def run(count: int) -> list[int]:
        with torch.inference_mode():
            out = whole.generate(
                text[None], attention_mask=torch.ones_like(text)[None], do_sample=False, max_new_tokens=count,
                min_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
        return out[0, len(text) :].tolist()  # type: ignore[no-any-return]

    began = time.perf_counter()
    run(1)
    first = time.perf_counter()
    found = run(tokens + 1)
    return tokens / max(time.perf_counter() - first - (first - began), 1e-9), found[:tokens]


def _decode(span: SpanModel, texts: Sequence[torch.Tensor], tokens: int) -> tuple[float, list[list[int]]]:
    """Aggregate tokens per second behind the prompts, and the tokens."""
    caches: list[Cache | None] = [span.new_cache(_LENGTH) for _ in texts]
    last = [
        int(span.forward([Segment(cache, 0, text, wanted=[len(text) - 1])])[0].argmax())
        for cache, text in zip(caches, texts, strict=True)
    ]
    found = [[token] for token in last]
    began = time.perf_counter()
    for step in range(tokens):
        segments = [
            Segment(cache, len(text) + step, torch.tensor([own[-1]]))
            for cache, text, own in zip(caches, texts, found, strict=True)
        ]
        for own, logits in zip(found, span.forward(segments), strict=True):
            own.append(int(logits.argmax()))
    return tokens * len(texts) / (time.perf_counter() - began), [own[:tokens] for own in found]


def _prefill(span: SpanModel, text: torch.Tensor) -> None:
    span.forward([Segment(span.new_cache(_LENGTH), 0, text, wanted=[len(text) - 1])])


def _stock_prefill(whole: Any, text: torch.Tensor) -> None:
    with torch.inference_mode():
        whole(input_ids=text[None], past_key_values=DynamicCache(config=whole.config), logits_to_keep=1)


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tallystick_devnet.bench.model", description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint; without it, a random Llama of 134 M parameters")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each run")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    folder = options.model or random_llama(Path("~/.cache/tallystick-bench/llama-134m").expanduser())

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    figures = model_figures(folder, threads=options.threads, pairs=options.pairs, tokens=options.tokens, say=say)
    for name, value in figures.items():
        say(f"{name:40s} {value:.4g}")
    if options.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
