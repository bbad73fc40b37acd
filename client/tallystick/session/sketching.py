"""Sketches in one session: challenges drawn once every hop has committed itself, links checked, audits across classes.

The challenge of a window is drawn when the receipts of all hops for it are in, and is the same for all of them, for
auditors and for whoever takes a hop's place later: that one's rows are bound by what its neighbours had signed before.
"""

from __future__ import annotations

import secrets
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tallystick.admission import has_class
from tallystick.attribution import failed
from tallystick.checks import check_output
from tallystick.comparing import Found, Work, across
from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import auditors, foreign_auditors
from tallystick.routing.suspicions import Pair, Side
from tallystick.session.remote import Remote
from tallystick.session.sketchbook import Challenge
from tallystick_protocol.errors import LinkMismatch, TallystickError, Unreachable
from tallystick_protocol.frames import MAX_TENSOR, Frame, Kind
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.sketching.matrix import CHALLENGE_BYTES
from tallystick_protocol.sketching.rows import ROW_BYTES, Sketches, sketch
from tallystick_protocol.sketching.statistic import is_linked
from tallystick_protocol.sketching.thresholds import MEDIAN_WINDOWS, Zone
from tallystick_protocol.types import WINDOW, Digest

if TYPE_CHECKING:
    from tallystick.session.auditing import Audit
    from tallystick.session.session import Session


class Undecided(Exception):
    """An auditor of another class can neither clear a window nor blame anybody for it."""

    def __init__(self, window: int, found: Found) -> None:
        super().__init__(window)
        self.window = window
        self.found = found


class Sketching:
    """The sketches of one session. is_on: whether they are in use, at all its nodes."""

    def __init__(self, session: Session) -> None:
        self.is_on = False
        self._challenges: dict[int, Challenge] = {}
        self._linked: dict[int, tuple[Digest, ...]] = {}
        self._session = session

    def decide(self) -> None:
        """Before the hops are opened: are sketches used? They cost rows' memory and a round trip a window, so by
        themselves only where some hop can be checked by nodes of other classes alone."""
        session, setting = self._session, self._session.setting
        possible = setting.wire == "f32" and all(has_class(hop) for hop in session.route)
        if session.one_shot and setting.max_length * ROW_BYTES > MAX_TENSOR:
            possible = False
        wanted = setting.sketches == "on"
        if setting.sketches == "auto" and session.verdict.policy != "off":
            wanted = any(self._needs_another_class(index) for index in range(len(session.route)))
        self.is_on = possible and wanted

    def _needs_another_class(self, index: int) -> bool:
        session = self._session
        asked = session.setting.candidates, session.route, index, session.unfit
        return not auditors(*asked) and bool(foreign_auditors(*asked))

    def forget(self, position: int) -> None:
        """Rows from `position` on were taken back: their windows are challenged anew."""
        kept = 0 if self._session.one_shot else position // WINDOW
        self._challenges = {window: found for window, found in self._challenges.items() if window < kept}
        self._linked = {window: found for window, found in self._linked.items() if window < kept}

    async def tend(self) -> None:
        """Draw challenges that are due, send them, and look whether the answers of neighbours fit together."""
        session = self._session
        if not self.is_on:
            return
        self._draw()
        for remote in [*session.everybody(), *session.witnesses]:
            await self.ask(remote)
        self._check_links()

    async def ask(self, remote: Remote) -> None:
        """Send a node the challenges to what it has signed, as far as they are drawn."""
        if not remote.sketchbook.is_on:
            return
        standing = remote.standing
        for window, (receipt, digest) in enumerate(zip(standing.receipts, standing.digests, strict=True)):
            challenge = self._challenges.get(window)
            if challenge is None or challenge.positions != receipt.positions:
                return
            if remote.sketchbook.ask(digest, challenge):
                body = {"receipt": digest, "challenge": challenge.value}
                try:
                    await remote.send(Frame(Kind.CHALLENGE, body, receipt.first))
                except Unreachable:
                    return  # whoever mends that has it asked again

    def late(self) -> int | None:
        """The first hop that owes an answer, or its closing receipt."""
        for index, hop in enumerate(self._session.hops):
            book, digests = hop.sketchbook, hop.standing.digests
            if book.owes(digests) or (self._is_complete(hop) and book.is_on and book.closed != digests[-1]):
                return index
        return None

    def _is_complete(self, hop: Remote) -> bool:
        """Whether the last rows there are were flushed and signed by a hop."""
        return self._session.is_flushed and hop.standing.covered == len(self._session.ids) > 0

    def payable(self, hop: Remote) -> int:
        """The rows that a node may be paid: of windows whose sketches are in, of the last one when a closing receipt
        carries them; a hop only of those where all hops' sketches fit together."""
        book, standing = hop.sketchbook, hop.standing
        if not book.is_on:
            return hop.rows_due
        is_hop = hop in self._session.hops
        given = next(
            (
                at
                for at, digest in enumerate(standing.digests)
                if digest not in book.answers or (is_hop and digest not in self._linked.get(at, ()))
            ),
            None,
        )
        if given is not None:
            return hop.due_to(given)
        if self._is_complete(hop) and book.closed != standing.digests[-1]:
            return hop.due_to(len(standing.digests) - 1)
        return hop.rows_due

    # -- audits across classes

    def work(self, remote: Remote, window: int, rows: dict[int, bytes]) -> Work | None:
        """What a node claims for a window; None while its sketches are not in. rows: the results that it returned.

        Raises CorruptResult unless it returned what it signed.
        """
        receipt, digest = remote.standing.receipts[window], remote.standing.digests[window]
        sketches = remote.sketchbook.answers.get(digest)
        if remote.sketchbook.is_on and sketches is None:
            return None
        results = self._results(receipt, rows)
        if results:
            check_output(receipt, results)
        return Work(receipt, sketches, tuple(results))

    def judge(self, audit: Audit, window: int) -> Found | None:
        """Compare one window of an audited hop with its auditor's, of another class; None: sketches are missing."""
        session = self._session
        hop = session.hops[audit.index]
        claim = self.work(hop, window, session.results.rows)
        answer = self.work(audit.remote, window, audit.results.rows)
        if claim is None or answer is None:
            return None
        earlier = [audit.squares[at] for at in range(window) if at in audit.squares]
        found = across(claim, answer, session.setting.manifest, session.setting.top_k, earlier)
        if found.squares is not None:
            audit.squares[window] = found.squares
        if self._remember(audit, hop, claim.receipt, found):
            raise Undecided(window, found)
        return found

    def _remember(self, audit: Audit, hop: Remote, receipt: Receipt, found: Found) -> bool:
        """Add a window to what is known of the two nodes; whether that shows that one of them computes something else,
        though nobody knows which: then this auditor can clear nothing of this hop."""
        suspicions, model = self._session.setting.suspicions, self._session.setting.manifest.model_id
        pair = Pair(model.hex(), receipt.span, _side(hop.candidate), _side(audit.remote.candidate))
        if found.scores is not None:
            suspicions.note(pair, Digest(receipt.input), found.scores)
        return found.zone is not Zone.GUILTY and suspicions.of(pair).is_conclusive

    def look_further(self, audit: Audit, window: int, found: Found, both: int) -> Found | None:
        """Behind a window that was neither clear nor bad: the first bad one, or None to wait. Raises Undecided when
        there are enough windows, or no more come. both: how many windows both have signed."""
        seen = 1
        for later in range(window + 1, min(both, window + MEDIAN_WINDOWS)):
            judged = self.judge(audit, later)
            if judged is None:
                return None
            if judged.zone is Zone.GUILTY:
                return judged
            seen += 1
        covered = self._session.hops[audit.index].standing.covered
        is_all = self._session.is_flushed and covered == len(self._session.ids) == audit.remote.standing.covered
        if seen >= MEDIAN_WINDOWS or (is_all and window + seen == both):
            raise Undecided(window, found)
        return None

    def _results(self, receipt: Receipt, rows: dict[int, bytes]) -> list[bytes]:
        session = self._session
        if not session.setting.manifest.is_result(receipt.span):
            return []
        return session.result_rows(receipt.positions, rows)

    # -- challenges and links

    def _draw(self) -> None:
        hops = self._session.hops
        for window in range(min(len(hop.standing.receipts) for hop in hops)):
            receipts = [hop.standing.receipts[window] for hop in hops]
            positions = receipts[0].positions
            if any(receipt.positions != positions for receipt in receipts):
                return
            for (before, one), (after, other) in pairwise(zip(hops, receipts, strict=True)):
                if one.output != other.input:  # one of them is new, and signed anew what the other had got otherwise
                    newer = max(before, after, key=lambda hop: hop.opening.attempt)
                    newer.failure = newer.failure or _mismatch(newer, "signed other rows than its neighbour")
                    return
            known = self._challenges.get(window)
            if known is None or known.positions != positions:
                self._challenges[window] = Challenge(positions, secrets.token_bytes(CHALLENGE_BYTES))

    def _check_links(self) -> None:
        """A link that does not hold is the pair's fault: both are replaced and not used in this session again, neither
        is blamed."""
        hops = self._session.hops
        for window in range(min(len(hop.standing.receipts) for hop in hops)):
            digests = tuple(hop.standing.digests[window] for hop in hops)
            if self._linked.get(window) == digests:
                continue
            answers = [hop.sketchbook.answers.get(digest) for hop, digest in zip(hops, digests, strict=True)]
            if any(answer is None for answer in answers):
                return
            ends = [*answers, self._returned(window)]
            for at, (before, after) in enumerate(pairwise(ends)):
                if before is not None and after is not None and not is_linked(*_shared(before, after)):
                    for hop in hops[at : at + 2]:
                        self._part_with(hop)
                    return
            self._linked[window] = digests

    def _part_with(self, hop: Remote) -> None:
        """One of two whose sketches do not fit together is replaced, and told of in the verdict."""
        session, mismatch = self._session, _mismatch(hop, "sketched other rows than its neighbour")
        if hop.node not in session.avoid:
            session.verdict.attributions.append(failed(mismatch, hop.node, hop.candidate.span))
        session.avoid.add(hop.node)
        hop.failure = hop.failure or mismatch

    def _returned(self, window: int) -> Sketches | None:
        """The client's own sketches of the hidden rows that left the model; None where results are no hidden rows."""
        session = self._session
        manifest, receipt = session.setting.manifest, session.hops[-1].standing.receipts[window]
        if manifest.output_of(receipt.span) != "hidden":
            return None
        unwanted = np.full(manifest.width, np.nan, dtype="<f4").tobytes()
        data = b"".join(row or unwanted for row in self._results(receipt, session.results.rows))
        rows = np.frombuffer(data, dtype="<f4").reshape(-1, manifest.width)
        return sketch(self._challenges[window].value, receipt.positions, rows, None)


def _shared(before: Sketches, after: Sketches) -> tuple[Any, Any]:
    """Both, without the rows that nobody wanted."""
    wanted = ~np.isnan(after.rows).any(axis=1)
    cut = (Sketches(one.challenge, one.positions, one.rows[wanted]) for one in (before, after))
    return next(cut), next(cut)


def _side(candidate: Candidate) -> Side:
    return Side(candidate.node, candidate.operator)


def _mismatch(hop: Remote, what: str) -> TallystickError:
    return LinkMismatch(f"{hop.node} {what}", hop=hop.node)
