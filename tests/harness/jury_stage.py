"""A chain, a published model and jurors as node software, looked after by hand: what tests of the Court play on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import checkpoints, samples
from harness.bench_court import CourtBench
from harness.checkpoints import Published, published
from harness.claims import claim
from tallystick.publishing import serve_content
from tallystick_devnet.localchain import start_chain
from tallystick_model.kept_classes import KeptClasses
from tallystick_model.loader import load_span
from tallystick_node.config import NodeConfig, process_environment
from tallystick_node.jury.juror import Juror
from tallystick_node.jury.recompute import examine
from tallystick_node.session.rows import RowFormat
from tallystick_protocol.chain.court import State, case_id
from tallystick_protocol.chain.docket import encode_sources, receipt_words
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.evidence.bundle import Bundle
from tallystick_protocol.evidence.checking import read_evidence
from tallystick_protocol.receipts import Context, Receipt
from tallystick_protocol.signing import from_words
from tallystick_protocol.types import Address, Digest, Span

DEADLINE_S = 90.0
NUM_JURORS = 3


@dataclass(slots=True)
class Trial:
    """A chain, a published model, a store that serves it and evidence, and jurors that are looked after by hand."""

    bench: CourtBench
    made: Published
    numeric_class: Digest
    folder: Path
    url: str = ""

    def bundle(self, spoil: float, wanted: int = 3) -> Bundle:
        """What the accused signed for 40 positions at the model's end, wrong by so much."""
        manifest = self.made.manifest
        span = Span(manifest.layers - 1, manifest.layers)
        model = load_span(manifest, span, self.made.open_piece)
        rows = RowFormat(manifest, span, 8)
        draw = np.random.default_rng(2)
        inputs = [row.tobytes() for row in draw.normal(size=(40, manifest.width)).astype(np.float32)]
        want = [at >= 40 - wanted for at in range(40)]
        result = model.forward([rows.segment(model.new_cache(40), 0, inputs, want)])[0]
        outputs = rows.outputs(result * (1 + spoil * torch.linspace(0, 1, result.shape[1])), want)
        receipt = samples.receipt(
            node=self.bench.accused.address, model=self.bench.model, numeric_class=self.numeric_class, start=span.start,
            end=span.end, session=samples.digest(f"session {spoil}"), at=self.bench.docket.head()[1],
        )  # fmt: skip
        context = Context(manifest.numerics, "f32", 8, ())
        domain = self.bench.docket.chain.book.staking_domain
        return claim(receipt, inputs, outputs, want, context=context, key=self.bench.hot, domain=domain)

    def accuse(self, bundle: Bundle, data: bytes | None = None, sources: list[str] | None = None) -> Digest:
        """Pin it, open the case; its id. data: other bytes that are pinned in its place."""
        domain = self.bench.docket.chain.book.staking_domain
        accused = from_words(Receipt, bundle.sealed[-1][:-65])
        cid = self.made.store.put_file(BytesIO(bundle.encode() if data is None else data))
        self.made.store.pin(cid)
        court = self.bench.docket.chain.court.functions
        call = court.open(receipt_words(accused), bundle.sealed[-1][-65:], cid.digest)
        self.bench.accuser.send("accusing", call, encode_sources([self.url] if sources is None else sources))
        return case_id(read_evidence(domain, bundle.encode()).digest, Digest(cid.digest))

    def juror(self, number: int, process: bool = False, **settings: Any) -> Juror:
        """A new process's juror on what the last one left. process: recompute in one, too, which loads torch anew."""
        wallet = self.bench.jurors[number]
        return self.node(wallet.address, wallet, f"state{number}", process, **settings)

    def node(self, node: Address, wallet: Wallet, state: str, process: bool = False, **settings: Any) -> Juror:
        """Any node's service to the Court, in a folder of its own."""
        config = NodeConfig(
            hot_key=self.folder / "none", state=self.folder / state, jury_poll_s=0.1, threads=1,
            class_cache=self.folder / "classes", **settings,
        )  # fmt: skip
        own = LocalStore(config.state / "store")
        juror = Juror(config, node, wallet, own, lambda _: True, config.state)
        if not process:
            juror._in_a_process = partial(asyncio.to_thread, examine)  # type: ignore[method-assign]
        return juror

    async def until(self, jurors: list[Juror], what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < deadline, f"{what} took too long"
            self.bench.rpc("evm_mine")
            for juror in jurors:
                await juror.look()
            await asyncio.sleep(0.05)

    def standing(self, case: Digest) -> Any:
        return self.bench.docket.standing(case)

    def seated(self, case: Digest, round_: int = 0, seed: Digest | None = None) -> dict[int, int]:
        """Seats of each juror that has any."""
        docket, standing = self.bench.docket, self.standing(case)
        seed = docket.seed(case, round_) if seed is None else seed
        found = {
            number: len(docket.seats(case, standing, round_, juror.address, seed))
            for number, juror in enumerate(self.bench.jurors)
        }
        return {number: seats for number, seats in found.items() if seats}

    def votes(self, case: Digest, round_: int = 0) -> dict[int, int]:
        docket = self.bench.docket
        found = {n: docket.ballot(case, round_, one.address) for n, one in enumerate(self.bench.jurors)}
        return {number: ballot.vote for number, ballot in found.items() if ballot.seats}

    def committed(self, case: Digest, but: set[int] = frozenset()) -> bool:  # type: ignore[assignment]
        if self.standing(case).state is not State.DRAWN:
            return False
        return (
            set(self.votes(case, self.standing(case).round)) == set(self.seated(case, self.standing(case).round)) - but
        )

    def to_seed(self, case: Digest, is_fit: Callable[[dict[int, int]], bool] | None = None) -> None:
        """The seed block is behind us: a draw is due, of seats that make a quorum and are fit for the test."""
        docket, standing = self.bench.docket, self.standing(case)
        needed = (15, 31, 61)[standing.round] // 2 + 1
        while True:
            snapshot = self.bench.rpc("evm_snapshot")
            self.bench.rpc("anvil_mine", hex(standing.seed_block + 1 - docket.head()[0]))
            seats = self.seated(case, standing.round, docket.future_seed(case, standing.round, standing.seed_block))
            if sum(seats.values()) >= needed and (is_fit is None or is_fit(seats)):
                return
            self.bench.rpc("evm_revert", snapshot)

    def to_reveals(self, case: Digest) -> None:
        self.bench.wait(self.standing(case).commit_end - self.bench.docket.head()[1])


@contextmanager
def open_stage(folder: Path) -> Iterator[Trial]:
    """The chain and the model, for all tests of a module."""
    torch.set_num_threads(1)
    made = published(checkpoints.llama(folder / "checkpoint", tie_word_embeddings=False), folder)
    for cid in (made.manifest.cid, *(piece.cid for piece in made.manifest.pieces)):
        made.store.pin(cid)
    numeric_class = KeptClasses(folder / "classes", process_environment()).find(made.manifest).numeric_class
    local = start_chain(folder)
    try:
        bench = CourtBench(
            local, Digest(made.manifest.cid.digest), made.manifest.weights, made.manifest.layers, NUM_JURORS
        )
        yield Trial(bench, made, numeric_class, folder)
    finally:
        local.process.stop()


@asynccontextmanager
async def open_trial(stage: Trial, folder: Path) -> AsyncIterator[Trial]:
    """One test's: evidence is served, and what happens on chain is taken back at the end."""
    snapshot = stage.bench.rpc("evm_snapshot")
    runner, url = await serve_content(stage.made.store, "127.0.0.1", 0)
    (folder / "classes").symlink_to(stage.folder / "classes")
    yield replace(stage, folder=folder, url=url)
    await runner.cleanup()
    stage.bench.rpc("evm_revert", snapshot)
