"""A juror recomputes a real span from evidence alone and votes as the rulings say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness import checkpoints, samples
from harness.checkpoints import published
from harness.claims import claim
from tallystick_model.canonical.kernels import CanonicalLinear
from tallystick_model.kept_classes import KeptClasses
from tallystick_model.loader import load_span
from tallystick_node.config import process_environment
from tallystick_node.jury.judging import Finding, judge
from tallystick_node.jury.recompute import examine
from tallystick_node.session.rows import RowFormat
from tallystick_protocol.chain.court import Vote
from tallystick_protocol.evidence.bundle import Bundle
from tallystick_protocol.evidence.checking import read_evidence
from tallystick_protocol.evidence.recomputing import Job
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.receipts import Context
from tallystick_protocol.types import Digest, Span
from tallystick_protocol.wire import Wire, encode

POSITIONS, TOP_K = 70, 8
KEY = samples.key("hot")


@dataclass(slots=True)
class Bench:
    """A published model, and what jurors of this machine need to judge it."""

    manifest: Manifest
    pieces: dict[str, str]
    folder: Path
    numeric_class: Digest

    def claimed(
        self,
        span: Span,
        spoil: Callable[[Any], None] = lambda _: None,
        wire: Wire = "f32",
        closing: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Bundle:
        """What a node signs for 70 positions that it computed. spoil: changes its model. closing: of `claim`."""
        model = load_span(self.manifest, span, lambda piece: Path(self.pieces[str(piece.cid)]))
        spoil(model)
        rows = RowFormat(self.manifest, span, TOP_K, wire)
        draw = np.random.default_rng(1)
        if rows.is_first:
            inputs = [int(token).to_bytes(4, "little") for token in draw.integers(0, self.manifest.vocab, POSITIONS)]
        else:
            inputs = encode(draw.normal(size=(POSITIONS, self.manifest.width)).astype(np.float32), wire)
        want = [at >= POSITIONS - 5 for at in range(POSITIONS)]
        segment = rows.segment(model.new_cache(POSITIONS), 0, inputs, want)
        outputs = rows.outputs(model.forward([segment])[0], want)
        receipt = samples.receipt(start=span.start, end=span.end, numeric_class=self.numeric_class)
        context = Context(self.manifest.numerics, wire, TOP_K, ())
        return claim(
            replace(receipt, **changes), inputs, outputs, want, context=context, key=KEY, between=not rows.is_last,
            closing=closing,
        )  # fmt: skip

    def job(self, bundle: Bundle) -> Job:
        path = self.folder / "evidence"
        path.write_bytes(bundle.encode())
        domain = samples.STAKING
        return Job(
            str(path), read_evidence(domain, bundle.encode()).digest.hex(), str(self.folder / "manifest"), self.pieces,
            domain.chain_id, domain.contract, str(self.folder / "classes"), 1, 0,
        )  # fmt: skip

    def examine(self, bundle: Bundle) -> Finding:
        return examine(self.job(bundle))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("jury")
    torch.set_num_threads(1)
    made = published(checkpoints.llama(folder / "checkpoint", tie_word_embeddings=False), folder)
    manifest = replace(made.manifest, norms=((0.0, 1e9),) * (made.manifest.layers + 1))
    pieces = {}
    for piece in manifest.pieces:
        pieces[str(piece.cid)] = str(folder / str(piece.cid))
        made.store.read_file(piece.cid, folder / str(piece.cid), piece.bytes)
    (folder / "manifest").write_bytes(manifest.to_bytes())
    found = KeptClasses(folder / "classes", process_environment()).find(manifest).numeric_class
    return Bench(manifest, pieces, folder, found)


def noisy(size: float) -> Callable[[Any], None]:
    """One row of one weight, as tests/faults/noisy_node.py has it."""

    def spoil(model: Any) -> None:
        linear = next(m for m in model._spliced.skeleton.model.modules() if isinstance(m, CanonicalLinear))
        dense = linear.plain_weight()
        noise = torch.randn(dense.shape[1], generator=torch.Generator().manual_seed(0))
        dense[0] += size * dense[0].norm() / noise.norm() * noise
        linear.weight = CanonicalLinear(dense, linear.bias).weight

    return spoil


def spans(bench: Bench) -> list[Span]:
    last = bench.manifest.layers
    return [Span(0, 1), Span(1, last - 1), Span(last - 1, last)]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_honest_work_is_clear_and_noise_is_guilty_wherever_the_span_is(bench: Bench, which: int) -> None:
    span = spans(bench)[which]
    honest = bench.examine(bench.claimed(span))
    assert (honest.problem, honest.equal, honest.error, honest.same_class) == ("", True, 0.0, True), honest
    assert judge(honest) == Vote.CLEAR
    guilty = bench.examine(bench.claimed(span, noisy(0.3)))
    assert judge(guilty) == Vote.GUILTY, guilty
    assert guilty.root == honest.root  # the juror's own, over the same rows
    sizes = (1e-6, 3e-6, 1e-5, 3e-5)  # the least one that changes a bit
    small = next(found for size in sizes if not (found := bench.examine(bench.claimed(span, noisy(size)))).equal)
    assert judge(small) == Vote.FAULT, small


def test_without_output_rows_wrong_bits_are_a_fault_and_right_ones_clear(bench: Bench) -> None:
    span = spans(bench)[1]
    assert judge(bench.examine(replace(bench.claimed(span), outputs=None))) == Vote.CLEAR
    found = bench.examine(replace(bench.claimed(span, noisy(0.3)), outputs=None))
    assert (found.equal, found.error, judge(found)) == (False, None, Vote.FAULT)


def test_a_closing_receipt_is_judged_by_itself(bench: Bench) -> None:
    span = spans(bench)[1]
    assert judge(bench.examine(bench.claimed(span, closing={}))) == Vote.CLEAR
    assert judge(bench.examine(bench.claimed(span, noisy(0.3), closing={}))) == Vote.GUILTY
    lie = replace(bench.claimed(span, closing={"output": samples.digest("lie")}), outputs=None)
    assert judge(bench.examine(lie)) == Vote.FAULT  # the window's own receipt is right


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_rounded_rows_are_compared_as_they_travelled(bench: Bench, wire: Wire) -> None:
    span = spans(bench)[1]
    assert judge(bench.examine(bench.claimed(span, wire=wire))) == Vote.CLEAR
    assert judge(bench.examine(bench.claimed(span, noisy(0.3), wire=wire))) == Vote.GUILTY


def test_another_class_is_convicted_of_gross_errors_alone(bench: Bench) -> None:
    other = samples.digest("another class")
    for span in spans(bench):
        honest = bench.examine(bench.claimed(span, numeric_class=other))
        assert (honest.same_class, judge(honest)) == (False, Vote.CLEAR)
        assert judge(bench.examine(replace(bench.claimed(span, noisy(0.3), numeric_class=other), outputs=None))) == (
            Vote.ABSTAIN
        )
        if span.end < bench.manifest.layers:
            slight = bench.examine(bench.claimed(span, noisy(0.3), numeric_class=other))
            assert judge(slight) == Vote.ABSTAIN, slight
        gross = bench.examine(bench.claimed(span, noisy(30.0), numeric_class=other))
        assert gross.spread is not None and gross.spread < 1e-2 * (gross.error or 0.0)
        assert judge(gross) == Vote.GUILTY, gross
    stock = bench.examine(bench.claimed(spans(bench)[1], numeric_class=bytes(32)))
    assert not stock.same_class


def test_rows_that_no_honest_node_takes_are_unreadable(bench: Bench) -> None:
    first, middle, _ = spans(bench)
    receipt = samples.receipt(start=middle.start, end=middle.end, numeric_class=bench.numeric_class)
    row = np.ones(bench.manifest.width, dtype="<f4")
    context = Context("fp32", "f32", TOP_K, ())
    for value in (np.nan, np.inf, 1e-40, 2e9):  # the last one beyond the manifest's norms
        bad = row.copy()
        bad[0] = value
        found = bench.examine(
            claim(receipt, [bad.tobytes()], [row.tobytes()], [True], context=context, key=KEY, between=True)
        )
        assert judge(found) == Vote.UNREADABLE, (value, found)
    beyond = bench.manifest.vocab.to_bytes(4, "little")
    receipt = samples.receipt(start=first.start, end=first.end)
    found = bench.examine(claim(receipt, [beyond], [row.tobytes()], [True], context=context, key=KEY, between=True))
    assert judge(found) == Vote.UNREADABLE


def test_output_rows_that_no_honest_node_signs_are_the_largest_error(bench: Bench) -> None:
    good = bench.claimed(spans(bench)[2])
    want, width = list(good.want), 8 * TOP_K
    for row in (np.full(2 * TOP_K, np.nan, "<f4").tobytes(), bytes(width)):
        receipt = samples.receipt(
            start=spans(bench)[2].start, end=spans(bench)[2].end, numeric_class=bench.numeric_class
        )
        outputs = [row if asked else b"" for asked in want]
        found = bench.examine(
            claim(receipt, good.inputs, outputs, want, context=Context("fp32", "f32", TOP_K, ()), key=KEY)
        )
        assert (found.error, judge(found)) == (float("inf"), Vote.GUILTY)


def test_what_this_machine_cannot_hold_is_abstained_from(bench: Bench) -> None:
    job = replace(bench.job(bench.claimed(spans(bench)[1])), memory=1)
    assert judge(examine(job)) == Vote.ABSTAIN
    assert "memory" in examine(job).why


@pytest.mark.nightly
def test_it_is_done_in_a_process_of_its_own(bench: Bench) -> None:
    path = bench.folder / "job.json"
    bench.job(bench.claimed(spans(bench)[2], noisy(0.3))).write(path)
    done = subprocess.run(
        [sys.executable, "-m", "tallystick_node.jury.recompute", str(path)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert judge(Finding.from_json(done.stdout.splitlines()[-1])) == Vote.GUILTY
    assert json.loads(done.stdout.splitlines()[-1])["seconds"] > 0
