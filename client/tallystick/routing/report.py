"""A route told to a person, or as plain values."""

from __future__ import annotations

from typing import Any

from tallystick.routing.candidates import Candidate
from tallystick.routing.cost import HOP_S, between, bounded
from tallystick.routing.route import Route


def route_to_json(route: Route, num_layers: int) -> dict[str, Any]:
    """Seconds per token, and for each hop what it is expected to take, why, and who would take its place."""
    hops = []
    for index, hop in enumerate(route.hops):
        standby = route.standbys[index]
        before = bounded(hop.rtt_s) if index == 0 else between(route.hops[index - 1], hop)
        hops.append(
            {
                **_named(hop),
                "of_layers": [hop.offer.start, hop.offer.end],
                "link_ms": _ms(before / 2),
                "compute_ms": _ms(HOP_S + len(hop.span) * bounded(hop.expected.layer_s)),
                "claimed_ms": _ms(HOP_S + len(hop.span) * bounded(hop.claimed.layer_s)),
                "wait_ms": _ms(hop.expected.wait_s),
                "failure": round(hop.expected.failure, 3),
                "price_wei_per_token": hop.offer.price * hop.span.units(num_layers),
                "standby": None if standby is None else _named(standby),
                "standby_is_disjoint": route.is_disjoint(index),
            }
        )
    return {
        "step_ms": _ms(route.step_s),
        "cost_s_per_token": round(route.cost_s, 6),
        "hops": hops,
        "return_ms": _ms(bounded(route.hops[-1].rtt_s) / 2),
    }


def route_to_lines(route: Route, num_layers: int) -> list[str]:
    """The same, a line for each hop."""
    told = route_to_json(route, num_layers)
    lines = [f"{told['step_ms']:g} ms expected for a token; {told['cost_s_per_token']:g} s with money and risk"]
    for hop in told["hops"]:
        early = "" if hop["layers"] == hop["of_layers"] else f", of {_span(hop['of_layers'])} that it offers"
        claim = "" if hop["claimed_ms"] == hop["compute_ms"] else f" ({hop['claimed_ms']:g} as it says)"
        lines.append(
            f"  {_span(hop['layers'])} {hop['node']} at {hop['url']}{early}: {hop['link_ms']:g} ms to it,"
            f" {hop['wait_ms']:g} waiting, {hop['compute_ms']:g} computing{claim};"
            f" lost in {hop['failure']:.0%} of sessions; {hop['price_wei_per_token']} wei a token"
        )
        standby = hop["standby"]
        if standby is None:
            lines.append("    nobody could take its place")
        else:
            owner = "another operator's" if hop["standby_is_disjoint"] else "of the same operator"
            lines.append(f"    {standby['node']} at {standby['url']} would take its place ({owner})")
    return [*lines, f"  {told['return_ms']:g} ms back"]


def _named(candidate: Candidate) -> dict[str, Any]:
    return {
        "node": candidate.node,
        "operator": candidate.operator,
        "layers": [candidate.span.start, candidate.span.end],
        "url": candidate.url,
    }


def _span(layers: list[int]) -> str:
    return f"[{layers[0]}, {layers[1]})"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
