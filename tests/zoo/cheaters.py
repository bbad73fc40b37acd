"""Nodes that compute wrongly, audited: the demo checkpoint over real text, in three spans."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from faults.computing import COMPUTING, matching
from tallystick_devnet.demo import default_model
from tallystick_devnet.localnet import thirds
from tallystick_model.span import SpanModel
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.types import Span
from zoo.audits import Task, audit, differs, outputs, serve
from zoo.models import demo

PROMPT, LENGTH = 24, 48
"""Positions of a text: a prompt in one frame, the others one by one. A window and a half."""


@dataclass(slots=True)
class Found:
    """audits: session-spans that were recomputed in the cheater's own class. caught: those that differed."""

    audits: int = 0
    caught: int = 0

    @property
    def detected(self) -> float:
        return self.caught / self.audits if self.audits else 0.0


def texts(count: int, seed: int, length: int = LENGTH) -> list[Task]:
    """Pieces of the text that the demo model was never shown."""
    tokenizer = Tokenizer.from_file(str(default_model() / "tokenizer.json"))
    ids = tokenizer.encode((default_model() / "heldout.txt").read_text()).ids
    draw = random.Random(seed)
    starts = [draw.randrange(len(ids) - length) for _ in range(count)]
    want = [at >= PROMPT - 1 for at in range(length)]
    return [Task([token.to_bytes(4, "little") for token in ids[at : at + length]], want, PROMPT) for at in starts]


def walk(
    count: int, seed: int, numerics: Numerics, length: int = LENGTH
) -> Iterator[tuple[Span, SpanModel, list[Task]]]:
    """Each span with what enters it."""
    model, tasks = demo(numerics), texts(count, seed, length)
    for span in thirds(model.manifest.layers):
        right = model.load(span)
        right.prepare()
        yield span, right, tasks
        tasks = [outputs(session, task) for session, task in zip(serve(right, tasks), tasks, strict=True)]


def spoilt(span: Span, name: str, numerics: Numerics) -> SpanModel:
    """A span at a node that computes wrongly."""
    bad = demo(numerics).load(span)
    COMPUTING[name](bad)
    bad.prepare()
    return bad


def measure(
    count: int, seed: int, numerics: Numerics = "fp32", say: Callable[[str], None] = lambda _: None
) -> dict[str, Found]:
    """`count` texts in each of three spans, computed by every cheater and recomputed by an honest node of its class."""
    found = {name: Found() for name in COMPUTING}
    for span, right, tasks in walk(count, seed, numerics):
        answers = audit(right, tasks)
        for name in matching(right):
            for hop, answer in zip(serve(spoilt(span, name, numerics), tasks), answers, strict=True):
                found[name].audits += 1
                found[name].caught += differs(hop.receipts(), answer) is not None
        say(f"layers {span}: {sum(one.caught for one in found.values())} of {sum(o.audits for o in found.values())}")
    return found
