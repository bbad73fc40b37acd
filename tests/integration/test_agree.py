"""`verify="agree=k"` through a real network: two routes of different owners say the same as one."""

from __future__ import annotations

import asyncio
import json

import pytest

from conftest import Running
from tallystick import AsyncClient
from tallystick.cli import summarise
from tallystick_protocol.errors import ConfigError, NoRoute
from tallystick_protocol.sampling import Sampling

PROMPT = "The function returns a list of"
TOKENS = 24
SAMPLING = Sampling(temperature=0.8, seed=3)


async def test_two_routes_say_what_one_does_and_share_no_owner(running: Running) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        alone = await client.generate(PROMPT, max_tokens=TOKENS, model=running.id, verify="off", sampling=SAMPLING)
        answer = await client.generate(
            PROMPT, max_tokens=TOKENS, model=running.id, verify="agree=2", sampling=SAMPLING, mode="auto"
        )
    assert answer.ids == alone.ids and len(answer.routes) == 2 and answer.routes[0] == answer.route
    first, second = ({owner for hop in route for owner in (hop.operator, hop.payee)} for route in answer.routes)
    assert not first & second
    verdict = answer.verdict
    assert verdict.checked == verdict.passed > 0 and not verdict.attributions and len(verdict.nodes) == 6
    said = json.loads(json.dumps(summarise(answer)))
    assert len(said["routes"]) == 2 and said["verdict"]["policy"] == "agree=2"
    assert said["verdict"]["paid"] == said["paid_wei"] > 0 == said["verdict"]["withheld"]
    assert len(said["verdict"]["spans"]) == 3


async def test_what_lacks_another_owner_is_named(running: Running) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        with pytest.raises(NoRoute, match=r"agree=3 takes 3 routes.*there are 2, and beside them nobody") as told:
            await client.generate(PROMPT, max_tokens=4, model=running.id, verify="agree=3")
        assert (told.value.fields["start"], told.value.fields["end"]) == (running.spans[0].start, running.spans[0].end)


async def test_what_takes_one_route_is_refused(running: Running) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        with pytest.raises(ConfigError, match="ring"):
            client.stream(PROMPT, model=running.id, verify="agree=2", mode="ring")
        with pytest.raises(ConfigError, match="one route"):
            client.decoder(running.id, max_length=8, verify="agree=2")
        with pytest.raises(ConfigError, match="one route"):
            await asyncio.wait_for(client.passes(running.id, verify="agree=4"), 30)
        with pytest.raises(ConfigError, match="agree=5"):
            client.stream(PROMPT, model=running.id, verify="agree=5")  # type: ignore[arg-type]
