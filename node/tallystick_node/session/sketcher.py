"""Sketches of one session's windows: the client's challenges, answered once each, from the rows that were kept."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from tallystick_node.session.rows import embedded, needed_ids
from tallystick_node.session.windows import Answer
from tallystick_protocol.errors import BadFrame, BadMessage
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame, take
from tallystick_protocol.sketching.matrix import CHALLENGE_BYTES
from tallystick_protocol.sketching.rows import ROW_BYTES, Sketches, sketch
from tallystick_protocol.types import Digest, Positions
from tallystick_protocol.wire import decode

if TYPE_CHECKING:
    from tallystick_node.session.hop import Hop

QUEUED_CHALLENGES = 64


class Sketcher:
    """Answers challenges, where sketches are in use. types: the token types of a one-shot session's ids."""

    def __init__(self, hop: Hop, is_on: bool) -> None:
        self.is_on = is_on
        self.types: list[int] = []
        self._answers: dict[Digest, Sketches] = {}
        self._queue: asyncio.Queue[Frame] = asyncio.Queue(QUEUED_CHALLENGES)
        self._hop = hop

    async def put(self, frame: Frame) -> None:
        """A CHALLENGE: answered in its turn."""
        await self._queue.put(frame)

    async def run(self) -> None:
        """Answer challenges; each answer may let another window be signed."""
        while True:
            await self._hop.report(self._answer(await self._queue.get()))
            self._hop.signer.wake()

    def crop(self) -> None:
        """Receipts were dropped, and their answers with them. Within the signer's lock."""
        standing = self._hop.windows.answers or {}
        self._answers = {digest: answer for digest, answer in self._answers.items() if digest in standing}

    async def _answer(self, frame: Frame) -> None:
        """Asked again the same, the answer is the same. A receipt that stands no more is past answering: it was signed
        before rows were taken back or added, and the client knows.

        Raises BadFrame, BadMessage for a second challenge to one receipt: only the first was unknown when it signed.
        """
        hop = self._hop
        challenge, digest = take(frame.body, "challenge", bytes), Digest(take(frame.body, "receipt", bytes))
        if hop.windows.answers is None or len(challenge) != CHALLENGE_BYTES:
            raise BadFrame(f"a challenge has {CHALLENGE_BYTES} bytes, in a session that was opened for sketches")
        async with hop.signer.lock:
            receipt = hop.windows.find(digest)
            if receipt is None:
                return
            found = self._answers.get(digest)
            if found is None:
                found = self._answers[digest] = await self._sketch(challenge, receipt.positions)
                hop.windows.answers[digest] = Answer(challenge, found.root)
            elif found.challenge != challenge:
                raise BadMessage("this receipt was challenged before, otherwise")
        await hop.control.send(sketches_frame(digest, found))

    async def _sketch(self, challenge: bytes, positions: Positions) -> Sketches:
        """The sketches of rows that are signed for. Within the signer's lock: they cannot be taken back meanwhile."""
        hop = self._hop
        given, scales = hop.record.inputs(positions)
        outputs, _ = hop.record.outputs(positions)
        if hop.rows.is_first:
            entered = await self._embedded(positions)
        else:
            entered = decode(b"".join(given), hop.rows.wire, hop.model.manifest.width)
        left = hop.rows.hidden(outputs)
        return await asyncio.to_thread(sketch, challenge, positions, entered, left, scales)

    async def _embedded(self, positions: Positions) -> Any:
        """The embedding's output, (n, width) float32: computed again, since nobody kept it."""
        hop = self._hop
        at = needed_ids(hop.model, positions)
        ids, _ = hop.record.inputs(at)
        work = partial(embedded, hop.model, ids, at, self.types)
        return (await hop.shop.engine.run(work, hop.client, len(ids)))[-len(positions) :].numpy()


def sketches_frame(digest: Digest, sketches: Sketches) -> Frame:
    """An answer. digest: of the receipt that was challenged."""
    data = sketches.to_bytes()
    rows = [data[at : at + ROW_BYTES] for at in range(0, len(data), ROW_BYTES)]
    body = {"receipt": digest, "challenge": sketches.challenge}
    return rows_frame(Kind.SKETCHES, DType.F32, rows, sketches.positions.first, body)
