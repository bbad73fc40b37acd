"""`scripts/chaos`: a live network under load, in which something fails every moment, and whether anybody notices.

Several clients ask without a pause; every answer is compared with what the same network said undisturbed. At the end
all is mended, and nodes must hold nothing any more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tallystick.client import AsyncClient
from tallystick.generation import Mode, Stream, Token
from tallystick.settings import Settings
from tallystick.verdict import Policy
from tallystick_devnet.demo import default_model
from tallystick_devnet.faults import Faults, Victim
from tallystick_devnet.leaks import Holdings, holdings, leaks
from tallystick_devnet.localnet import CLIENT_TOKENS, LocalNet, thirds
from tallystick_protocol.errors import ConfigError, NoAuditor, NoRoute, TallystickError
from tallystick_protocol.sampling import Sampling
from tallystick_protocol.signing import Key

LONG = " ".join(f"Line {n} of the file names a function, what it takes and what it returns." for n in range(16))
PROMPTS = ("The function returns a list of", "def main(arguments):\n    ", "Once upon a time, in a", LONG)
WAYS: tuple[tuple[Mode, str], ...] = (("pipeline", "off"), ("pipeline", "off"), ("ring", "off"), ("pipeline", "lookup"))
"""Who decides the tokens, and who drafts them."""

SAMPLINGS = (Sampling(), Sampling(temperature=0.9, top_p=0.95, seed=7))
POLICIES: tuple[Policy, ...] = ("off", "off", "audit", "full")
KINDS = ("kill", "kill", "kill", "hang", "cut", "flap", "late", "drain")
SETTLE_S = 45.0
BLACKOUTS = 0.1
"""How often the last node of a span may be hit that is well, when it is drawn."""

RETRY_S = 0.5
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """clients: how many ask at a time. every_s: seconds between two faults, on average."""

    minutes: float = 1.0
    clients: int = 3
    nodes: int = 9
    tokens: int = 40
    every_s: float = 2.0
    seed: int = 0


@dataclass(slots=True)
class Tally:
    """What has happened."""

    sessions: int = 0
    identical: int = 0
    different: int = 0
    not_opened: int = 0
    lost: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    gaps: list[float] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    broken: str | None = None

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, differed or leaked, and the run came to its end."""
        return not (self.different or self.lost or self.leaks or self.broken)

    def told(self) -> dict[str, Any]:
        """The JSON object."""
        gaps = sorted(self.gaps)
        return {
            "sessions": self.sessions,
            "kills": self.faults["kill"],
            "hangs": self.faults["hang"],
            "cuts": self.faults["cut"] + self.faults["flap"],
            "late": self.faults["late"],
            "drains": self.faults["drain"],
            "answers_identical": self.identical,
            "answers_different": self.different,
            "lost": len(self.lost),
            "not_opened_at_once": self.not_opened,
            "leaks": len(self.leaks),
            "worst_gap_s": round(gaps[-1], 2) if gaps else None,
            "median_gap_s": round(gaps[len(gaps) // 2], 4) if gaps else None,
            "broken": self.broken,
        }


class Chaos:
    """One run against one network."""

    def __init__(
        self, faults: Faults, client: AsyncClient, options: ChaosOptions, say: Callable[[str], None], tally: Tally
    ) -> None:
        self._faults, self._client = faults, client
        self._options = options
        self._say = say
        self._dice = random.Random(options.seed)
        self._busy: set[str] = set()
        self._first: dict[str, Holdings] = {}
        self._truth: dict[tuple[str, int], list[int]] = {}
        self.tally = tally

    async def run(self) -> None:
        """Have everything happen; then see what nodes hold that they should not."""
        for prompt in PROMPTS:
            for which in range(len(SAMPLINGS)):
                self._truth[prompt, which] = await self._ask(prompt, which, "off", WAYS[0])
        for victim in self._faults.victims:
            await self._note(victim)
        until = time.monotonic() + 60 * self._options.minutes
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._break(until))
            for _ in range(self._options.clients):
                tasks.create_task(self._load(until))
        await asyncio.to_thread(self._faults.revive)
        for victim in self._faults.victims:
            if victim.node.process.pid not in {int(pid) for pid in self._first}:
                await self._note(victim)
        self._say("everything is mended; what is left in the nodes?")
        standing = [
            (victim.node, victim.port, self._first[str(victim.node.process.pid)]) for victim in self._faults.victims
        ]
        self.tally.leaks = await asyncio.to_thread(leaks, standing, SETTLE_S)

    # -- load

    async def _load(self, until: float) -> None:
        while time.monotonic() < until:
            prompt, which = self._dice.choice(PROMPTS), self._dice.randrange(len(SAMPLINGS))
            policy, way = self._dice.choice(POLICIES), self._dice.choice(WAYS)
            self.tally.sessions += 1
            try:
                ids = await self._ask(prompt, which, policy, way)
            except TallystickError as error:
                self.tally.lost.append(f"{type(error).__name__}: {error}")
                self._say(f"LOST ({policy}, {way}): {type(error).__name__}: {error}")
                continue
            if ids == self._truth[prompt, which]:
                self.tally.identical += 1
            else:
                self.tally.different += 1
                self._say(f"DIFFERENT ({policy}, {way}): {ids} in place of {self._truth[prompt, which]}")

    async def _ask(self, prompt: str, which: int, policy: Policy, way: tuple[Mode, str]) -> list[int]:
        """An answer's ids. A session that cannot even begin, because nobody serves some layers, is tried again."""
        mode, speculate = way
        while True:
            stream = self._client.stream(
                prompt, max_tokens=self._options.tokens, sampling=SAMPLINGS[which], verify=policy, ignore_eos=True,
                mode=mode, speculate=speculate,
            )  # fmt: skip
            try:
                return await self._read(stream)
            except (NoRoute, NoAuditor):
                if stream.session_route:
                    raise
                self.tally.not_opened += 1
                await asyncio.sleep(RETRY_S)

    async def _read(self, stream: Stream) -> list[int]:
        last: float | None = None
        async for event in stream:
            if isinstance(event, Token):
                now = time.monotonic()
                if last is not None:
                    self.tally.gaps.append(now - last)
                last = now
        return stream.answer.ids

    # -- faults

    async def _break(self, until: float) -> None:
        acts = {
            "kill": self._kill, "hang": self._hang, "cut": self._cut, "flap": self._flap, "late": self._late,
            "drain": self._drain,
        }  # fmt: skip
        async with asyncio.TaskGroup() as going:
            while (left := until - time.monotonic()) > 0:
                await asyncio.sleep(min(left, self._dice.expovariate(1 / self._options.every_s)))
                victim, kind = self._dice.choice(self._faults.victims), self._dice.choice(KINDS)
                if self._is_spared(victim):
                    continue
                self.tally.faults[kind] += 1
                self._busy.add(victim.node.address)
                self._say(f"{kind}: {victim.node.name}, layers {victim.node.span}")
                going.create_task(self._suffer(victim, acts[kind]))

    def _is_spared(self, victim: Victim) -> bool:
        """Whether something happens to it already, or it is the last one of its span that is well: mostly, then."""
        alike = {other.node.address for other in self._faults.victims if other.node.span == victim.node.span}
        last = len(alike - self._busy) < 2 and self._dice.random() > BLACKOUTS
        return victim.node.address in self._busy or last

    async def _suffer(self, victim: Victim, act: Callable[[Victim], Coroutine[Any, Any, None]]) -> None:
        try:
            await act(victim)
        finally:
            self._busy.discard(victim.node.address)

    async def _kill(self, victim: Victim) -> None:
        await asyncio.to_thread(victim.node.process.kill)
        await asyncio.sleep(self._dice.uniform(0, 2))
        await self._restart(victim)

    async def _hang(self, victim: Victim) -> None:
        victim.node.process.hang()
        await asyncio.sleep(self._dice.uniform(0.5, 8))
        victim.node.process.go_on()

    async def _cut(self, victim: Victim) -> None:
        await asyncio.to_thread(victim.link.cut)

    async def _flap(self, victim: Victim) -> None:
        await asyncio.to_thread(victim.link.down)
        await asyncio.sleep(self._dice.uniform(0.05, 3))
        victim.link.up()

    async def _late(self, victim: Victim) -> None:
        victim.link.slow(self._dice.uniform(0.05, 0.5))
        await asyncio.sleep(self._dice.uniform(1, 4))
        victim.link.slow(0.0)

    async def _drain(self, victim: Victim) -> None:
        await asyncio.to_thread(victim.node.process.stop)
        await self._restart(victim)

    async def _restart(self, victim: Victim) -> None:
        await asyncio.to_thread(self._faults.restart, victim)
        await self._note(victim)

    async def _note(self, victim: Victim) -> None:
        """What a process holds that has just begun."""
        self._first[str(victim.node.process.pid)] = await asyncio.to_thread(holdings, victim.node, victim.port)


def run_chaos(options: ChaosOptions, folder: Path, say: Callable[[str], None], tally: Tally) -> None:
    """Run it all in `folder`, and count. Everything it starts is stopped when it returns or raises."""
    if options.nodes < 6:
        raise ConfigError("chaos takes at least 6 nodes: two for each of three spans")
    with LocalNet(folder, say) as net:
        model, manifest = net.publish(default_model())
        with Faults(net, model) as faults:
            net.prepare(options.nodes)
            spans = thirds(manifest.layers)
            for index in range(options.nodes):
                faults.add(spans[index % 3])
            for victim in faults.victims:
                victim.node.wait()
            say(f"{options.nodes} nodes serve")
            key, _ = net.client_key()
            settings = replace(net.settings(), max_cost=CLIENT_TOKENS, notify=say)
            asyncio.run(_suffer(faults, key, settings, options, say, tally))


async def _suffer(
    faults: Faults, key: Key, settings: Settings, options: ChaosOptions, say: Callable[[str], None], tally: Tally
) -> None:
    async with AsyncClient(key, settings) as client:
        await Chaos(faults, client, options, say, tally).run()
    for leak in tally.leaks:
        say(f"LEFT: {leak}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status is 0 when nothing was lost, nothing differed and nothing leaked. JSON is the last line anyway."""
    usual = ChaosOptions()
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=usual.minutes)
    parser.add_argument("--clients", type=int, default=usual.clients, help="answers that are asked for at a time")
    parser.add_argument("--nodes", type=int, default=usual.nodes)
    parser.add_argument("--tokens", type=int, default=usual.tokens, help="of each answer")
    parser.add_argument("--every-s", type=float, default=usual.every_s, help="seconds between faults, on average")
    parser.add_argument("--seed", type=int, default=usual.seed, help="which faults, in which order")
    parser.add_argument("--folder", type=Path, help="where logs are kept; default: nowhere")
    parser.add_argument("--log-level", default="error")
    parser.add_argument("--json", action="store_true", help="say nothing but one JSON object at the end")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    chaos = ChaosOptions(
        options.minutes, options.clients, options.nodes, options.tokens, options.every_s, options.seed
    )
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.2f} {text}", file=sys.stderr, flush=True)

    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="tallystick-chaos-") as temporary:
        try:
            run_chaos(chaos, options.folder or Path(temporary), (lambda _: None) if options.json else say, tally)
        except Exception as error:
            log.exception("the run broke off")
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            tally.broken = f"{type(error).__name__}: {error}"
    print(json.dumps(tally.told()))
    return 0 if tally.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
