"""How many threads compute a forward, and on which cores they are."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from tallystick_node.alone import alone, set_threads
from tallystick_node.config import NodeConfig
from tallystick_node.scheduling.threads import AGAIN, TRIES, Cores, Pace, Threads, _helpers, _running

several = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def taken(pace: Pace, turns: int, one_s: float, all_s: float) -> list[bool]:
    """What was chosen, where a forward takes so long."""
    chosen = []
    for _ in range(turns):
        chosen.append(pace.takes_all())
        pace.note(chosen[-1], all_s if chosen[-1] else one_s)
    return chosen


def test_both_choices_are_tried_and_then_the_quicker_one_is_taken_most_of_the_time() -> None:
    for one_s, all_s, quicker in ((2.0, 1.0, True), (1.0, 2.0, False), (1.0, 0.95, False)):
        chosen = taken(Pace(), 10 * AGAIN, one_s, all_s)
        assert chosen[: 2 * TRIES] == [True] * TRIES + [False] * TRIES
        assert chosen[2 * TRIES :].count(not quicker) <= 22


def test_the_first_forward_with_all_threads_which_begins_them_does_not_count() -> None:
    pace = Pace()
    pace.note(True, 100.0)
    assert taken(pace, AGAIN, 2.0, 1.0).count(True) > AGAIN - 5


def test_a_core_that_others_take_is_given_back_and_taken_again_when_they_are_gone() -> None:
    pace = Pace()
    taken(pace, AGAIN, 2.0, 1.0)
    assert taken(pace, AGAIN, 2.0, 4.0).count(True) < 10
    taken(pace, 6 * AGAIN, 2.0, 1.0)
    assert taken(pace, AGAIN, 2.0, 1.0).count(True) > AGAIN - 5


class Free(Cores):
    """Cores of which nobody else takes any, unless said so."""

    taken = False

    @property
    def are_taken(self) -> bool:
        return self.taken


@pytest.mark.parametrize("most", [1, 2])
def test_where_the_number_does_not_vary_it_is_what_was_configured(most: int) -> None:
    threads = Threads(most, None)
    for rows in (1, 1, 1, 64, 1, 1, 1, 1):
        threads.choose(rows)
        assert torch.get_num_threads() == most
        threads.note(rows, 1.0)


def in_a_thread(function: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@several
def test_forwards_of_many_rows_are_judged_by_themselves() -> None:
    def check() -> None:
        threads = Threads(2, Free(2))
        seen: dict[int, list[int]] = {1: [], 64: []}
        for _ in range(40):
            for rows, slow in ((1, 2), (64, 1)):
                threads.choose(rows)
                seen[rows].append(torch.get_num_threads())
                threads.note(rows, 2.0 if torch.get_num_threads() == slow else 1.0)
        assert seen[1].count(1) > 30 and seen[64].count(2) > 30
        threads.use_all()
        assert torch.get_num_threads() == 2

    in_a_thread(check)


def test_a_thread_keeps_its_number_whatever_others_set() -> None:
    def check() -> None:
        set_threads(1)
        in_a_thread(lambda: torch.set_num_threads(3))
        torch.ones(1 << 20).add_(1)
        assert torch.get_num_threads() == 1

    in_a_thread(check)


@several
def test_helpers_are_those_of_the_calling_thread_and_never_on_its_core() -> None:
    def check() -> None:
        torch.set_num_threads(2)
        others = {int(name) for name in os.listdir("/proc/self/task")}
        cores = Cores(2)
        for own in sorted(os.sched_getaffinity(0))[:2]:
            os.sched_setaffinity(0, {own})
            cores.part()
            assert cores._helpers is not None and len(cores._helpers) == 1 and cores._helpers[0] not in others
            found = os.sched_getaffinity(cores._helpers[0])
            assert len(found) == 1 and own not in found
        assert _helpers() == cores._helpers

    in_a_thread(check)


def test_no_more_threads_than_cores_are_placed() -> None:
    cores = Cores(1000)
    cores.part()
    assert cores._helpers == []


@several
def test_several_threads_are_not_tried_while_others_want_the_cores() -> None:
    def check() -> None:
        cores = Free(2)
        threads = Threads(2, cores)
        for taken, expected in ((True, 1), (False, 2), (True, 1)):
            cores.taken = taken
            threads.choose(1)
            assert torch.get_num_threads() == expected
            threads.note(1, 1.0)

    in_a_thread(check)


@pytest.mark.parametrize(
    ("load", "running"),
    [(b"0.20 0.18 0.12 1/80 11206\n", 1), (b"9.20 0.18 0.12 17/4000 1\n", 17)],
)
def test_how_many_want_to_run_is_read_from_the_load(load: bytes, running: int) -> None:
    assert _running(load) == running


def test_one_look_at_others_is_not_enough_and_a_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cores, load = Cores(2), [b"9.20 0.18 0.12 9999/10000 1"]
    monkeypatch.setattr(os, "pread", lambda *_: load[0])
    cores._load = 0
    seen = []
    for turn in range(20):
        load[0] = b"0.1 0.1 0.1 %d/10000 1" % (9999 if 5 <= turn < 15 else 1)
        cores.look()
        seen.append(cores.are_taken)
    assert not any(seen[:8]) and all(seen[10:15]) and not any(seen[-2:])
    cores._load = -1


@pytest.mark.parametrize("load", [b"", b"0.1 0.2", b"a b c d"])
def test_a_system_that_does_not_say_so_is_not_busy(load: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = Cores(2)
    monkeypatch.setattr(os, "pread", lambda *_: load)
    cores._load = 0
    for _ in range(9):
        cores.look()
    assert not cores.are_taken
    cores._load = -1


@several
def test_a_system_that_lets_nothing_be_placed_computes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no")

    def check() -> None:
        cores = Free(2)
        monkeypatch.setattr(os, "sched_setaffinity", refuse)
        threads = Threads(2, cores)
        for _ in range(8):
            threads.choose(1)
            threads.note(1, 1.0)
        assert cores._tries == 0
        threads.close()

    in_a_thread(check)


def test_the_setting_says_one_for_each_core() -> None:
    assert NodeConfig.model_fields["threads"].default == 0


async def test_work_beside_the_device_leaves_no_thread_behind() -> None:
    before = len(os.listdir("/proc/self/task"))

    def work(size: int) -> float:
        assert torch.get_num_threads() == 2
        return float(torch.ones(size).add_(1).sum())

    assert await alone(work, 1 << 20, threads=2) == 2 << 20
    for _ in range(1000):
        if len(os.listdir("/proc/self/task")) <= before:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("a helper is left")
