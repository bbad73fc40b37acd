"""Which nodes carry an answer: surveys with what was seen of nodes, routes planned over them, nodes not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from tallystick.admission import find_route
from tallystick.agreement.routes import disjoint
from tallystick.network import Network, Survey
from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import checkable
from tallystick.routing.cost import Workload
from tallystick.routing.planner import as_whole
from tallystick.routing.proven import Proven
from tallystick.routing.reputation import Reputation
from tallystick.routing.route import choose
from tallystick.routing.survey import PER_LAYER
from tallystick.routing.suspicions import Suspicions
from tallystick.settings import Settings
from tallystick.verdict import Policy
from tallystick_protocol.chain.reads import ModelRecord
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Address, ModelId, Span

T = TypeVar("T")


class Planning:
    """A client's choice of nodes. banned: those that are never used again."""

    def __init__(self, network: Network, settings: Settings) -> None:
        self._network, self._settings = network, settings
        cache = settings.cache.expanduser()
        self.reputation = Reputation(cache / "reputation.json")
        self.suspicions = Suspicions(cache / "suspicions.json")
        self.proven = Proven(cache / "classes.json")
        self.banned: set[Address] = set()
        self._told: set[Address] = set()

    def save(self) -> None:
        """Keep what was seen of nodes. Blocking."""
        self.reputation.save()
        self.suspicions.save()
        self.proven.save()

    async def route(
        self,
        record: ModelRecord,
        manifest: Manifest,
        stack: Span,
        verify: Policy = "audit",
        prompt: int = 0,
        new: int = 64,
        whole: bool = False,
    ) -> tuple[Survey, list[Candidate]]:
        """The nodes there are, and a route over a stack, near the best (`routing`). Raises NoRoute.

        prompt, new: positions that are given, and tokens that are expected. whole: of nodes that serve all they offer.
        """
        shunned = self.shunned(record.id)

        def find(survey: Survey) -> list[Candidate]:
            return self._route(survey, manifest, stack, verify, self.workload(manifest, prompt, new), shunned)

        return await self._over(record, shunned, PER_LAYER, whole, find)

    async def routes_apart(
        self, record: ModelRecord, manifest: Manifest, stack: Span, count: int, prompt: int = 0, new: int = 64
    ) -> tuple[Survey, list[list[Candidate]]]:
        """The nodes there are, and `count` routes that share no owner, of one numeric class. Raises NoRoute."""
        work, enough = self.workload(manifest, prompt, new), max(PER_LAYER, count + 1)
        wanted, shunned = self._settings.numeric_class, self.shunned(record.id)

        def find(usable: list[Candidate]) -> list[Candidate]:
            return choose(usable, work, stack, avoid=shunned, numeric_class=wanted).hops

        def find_all(survey: Survey) -> list[list[Candidate]]:
            return disjoint([c for c in survey.candidates if c.node not in shunned], count, find)

        return await self._over(record, shunned, enough, False, find_all)

    async def _over(
        self, record: ModelRecord, shunned: set[Address], enough: int, whole: bool, find: Callable[[Survey], T]
    ) -> tuple[Survey, T]:
        """The nodes that are known, and what is found over them; where that is nothing, those that are asked anew."""

        async def attempt(fresh: bool) -> tuple[Survey, T]:
            survey = self._informed(await self._network.survey(record, shunned, fresh, enough), whole)
            return survey, find(survey)

        try:
            return await attempt(fresh=False)
        except NoRoute:
            return await attempt(fresh=True)

    async def look_again(self, record: ModelRecord) -> list[Candidate]:
        """The nodes as they are now."""
        survey = await self._network.survey(record, self.shunned(record.id), fresh=True)
        return list(self._informed(survey, whole=False).candidates)

    def _informed(self, survey: Survey, whole: bool) -> Survey:
        """The nodes with what is expected of them after what was seen of them."""
        known = self.reputation.inform(survey.candidates)
        return replace(survey, candidates=as_whole(known) if whole else known)

    def workload(self, manifest: Manifest, prompt: int, new: int) -> Workload:
        """What an answer asks of a route. prompt, new: positions that are given, and tokens that are expected."""
        return Workload(
            manifest.layers, prompt, max(new, 1), 4 * manifest.width, self._settings.weights, self.which(manifest)
        )

    def which(self, manifest: Manifest) -> str:
        """A model's id, where the chain has others beside it; else nothing."""
        return "0x" + manifest.model_id.hex() if self._network.num_models > 1 else ""

    def _route(
        self, survey: Survey, manifest: Manifest, stack: Span, verify: Policy, work: Workload, shunned: set[Address]
    ) -> list[Candidate]:
        settings = self._settings

        def find(usable: list[Candidate]) -> list[Candidate]:
            if verify == "full":
                for across in (False, True) if self.compares else (False,):
                    try:
                        return among(checkable(usable, shunned, across))
                    except NoRoute:
                        continue  # then opening says which span nobody else can recompute
            return among(usable)

        def among(usable: list[Candidate]) -> list[Candidate]:
            return choose(usable, work, stack, avoid=shunned, numeric_class=settings.numeric_class).hops

        return find_route(survey.candidates, find, admit_stock=settings.admit_stock, policy=verify)

    @property
    def compares(self) -> bool:
        """Whether nodes of other classes can be auditors."""
        return self._settings.sketches != "off" and self._settings.wire == "f32"

    def shunned(self, model: ModelId) -> set[Address]:
        """Nodes that are not used for a model: those banned, and those that many of its windows speak against."""
        slow = self.suspicions.avoided(model)
        for node in slow - self._told:
            self._told.add(node)
            self._settings.notify(f"{node} is avoided: it differs from two others a little, again and again")
        return self.banned | slow
