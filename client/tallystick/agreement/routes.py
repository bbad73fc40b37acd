"""Routes that nobody shares: k of them side by side, of different operators and payees, all of one numeric class. Pure.

The first route is the best one; where it leaves too little for the others, routes around the hop in question are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tallystick.admission import has_class
from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import apart, owners, price_of
from tallystick.routing.gaps import unserved
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.types import Digest, Span

Route = list[Candidate]
Find = Callable[[list[Candidate]], Route]

MAX_TRIES = 64
"""Routes that are looked for in all, before it is said that there are too few."""


def disjoint(candidates: Sequence[Candidate], count: int, find: Find) -> list[Route]:
    """`count` routes that share no owner, the cheapest ones among the classes in which there are so many.

    find(usable): the best route over them, or NoRoute. Raises NoRoute naming the layers that lack another node.
    """
    found: list[list[Route]] = []
    lacking: list[_Lacking] = []
    for numeric_class in sorted({Digest(c.offer.numeric_class) for c in candidates if has_class(c)}):
        pool = [c for c in candidates if c.offer.numeric_class == numeric_class]
        try:
            found.append(_search(pool, count, find, iter(range(MAX_TRIES))))
        except _Lacking as lack:
            lacking.append(lack)
    if found:
        return min(found, key=lambda routes: sum(map(price_of, routes)))
    raise _told(count, max(lacking, key=lambda lack: lack.routes, default=None))


class _Lacking(Exception):
    """routes: as many there are; gap: why there is not another one, None where the tries were used up."""

    def __init__(self, routes: int, gap: NoRoute | None) -> None:
        super().__init__(routes)
        self.routes = routes
        self.gap = gap


def _search(pool: list[Candidate], count: int, find: Find, tries: Iterator[int]) -> list[Route]:
    if next(tries, None) is None:
        raise _Lacking(0, None)
    try:
        best = find(pool)
    except NoRoute as gap:
        raise _Lacking(0, gap) from None
    if count == 1:
        return [best]
    lacks: list[_Lacking] = []
    for first in _around(best, pool, find):
        try:
            return [first, *_search(apart(pool, owners(first)), count - 1, find, tries)]
        except _Lacking as lack:
            lacks.append(lack)
    furthest = max(lacks, key=lambda lack: (lack.routes, lack.gap is not None))
    raise _Lacking(furthest.routes + 1, furthest.gap)


def _around(best: Route, pool: list[Candidate], find: Find) -> Iterator[Route]:
    """The best route, then for each of its hops the best one without that hop's owner."""
    yield best
    for hop in best:
        try:
            yield find(apart(pool, owners([hop])))
        except NoRoute:
            continue


def _told(count: int, lack: _Lacking | None) -> NoRoute:
    asked = f"agree={count} takes {count} routes that share no operator and no payee, of one numeric class"
    if lack is None:
        return NoRoute(f"{asked}; no node of any class answers", start=0, end=0)
    gap = lack.gap
    span = None if gap is None else Span(int(gap.fields.get("start", 0)), int(gap.fields.get("end", 1)))
    if span is None:
        return NoRoute(f"{asked}; {lack.routes} were found", start=0, end=0)
    beside = f"there are {lack.routes}, and beside them" if lack.routes else "and"
    model = str(gap.fields.get("model", "")) if gap is not None else ""
    return unserved(f"{asked}; {beside} nobody serves layers {span}; to serve them", span, model)
