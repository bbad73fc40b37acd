"""Whose rows go next: a pure queue, driven by a clock of forwards."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallystick_node.scheduling.company import GAP_S, LAG_S, RECENT_S, Company
from tallystick_node.scheduling.load import Meter
from tallystick_node.scheduling.policy import MAX_STEP_ROWS, FairQueue, Job, Turn

BUDGET = 64


def rows_of(turn: Turn[Job]) -> dict[str, int]:
    rows: Counter[str] = Counter()
    for job, count in turn.picked:
        rows[job.payer] += count
    return dict(rows)


def test_steps_go_first_and_prompts_get_what_is_left() -> None:
    queue: FairQueue[Job] = FairQueue(BUDGET)
    prompt, other = Job("a", 512), Job("a", 100)
    steps = [Job("a", 1), Job("b", 4), Job("c", 1)]
    for job in (prompt, other, *steps):
        queue.put(job)
    picked = queue.pick(0.0).picked
    assert {id(job): count for job, count in picked[:3]} == {id(steps[0]): 1, id(steps[1]): 4, id(steps[2]): 1}
    assert picked[3:] == [(prompt, BUDGET - 6)]
    assert (len(queue), prompt.rows) == (2, 512 - BUDGET + 6)


@pytest.mark.parametrize("prompt", [512, 4096])
def test_a_prompt_delays_a_step_by_one_piece_of_it(prompt: int) -> None:
    queue: FairQueue[Job] = FairQueue(BUDGET)
    queue.put(Job("long", prompt))
    for _ in range(20):
        [(_, before)] = queue.pick(0.0).picked  # is being computed when the step comes
        step = Job("short", 1)
        queue.put(step)
        turn = queue.pick(0.0)
        assert before <= BUDGET and turn.picked[0] == (step, 1) and rows_of(turn)["long"] == min(prompt, BUDGET - 1)
        if prompt == 512:
            return


def test_a_prompt_goes_on_however_many_steps_there_are_of_the_same_payer() -> None:
    queue: FairQueue[Job] = FairQueue(BUDGET)
    prompt = Job("a", 160)
    queue.put(prompt)
    for turn in range(10):
        for _ in range(100):
            queue.put(Job("a", 1))
        assert any(job is prompt for job, _ in queue.pick(0.0).picked), turn
    assert prompt.rows == 0


def simulate(sessions: dict[str, tuple[int, int]], turns: int) -> Counter[str]:
    """Rows that each payer gets, whose sessions (how many, rows of each job) come again as soon as they are served."""
    queue: FairQueue[Job] = FairQueue(BUDGET)
    for payer, (count, rows) in sessions.items():
        for _ in range(count):
            queue.put(Job(payer, rows))
    got: Counter[str] = Counter()
    for _ in range(turns):
        turn = queue.pick(0.0)
        got.update(rows_of(turn))
        for job, _ in turn.picked:
            if not job.rows:
                queue.put(Job(job.payer, sessions[job.payer][1]))
    return got


@pytest.mark.parametrize("rows", [8, 64, 1000])
def test_fifty_sessions_get_no_more_than_one(rows: int) -> None:
    """A prompt of one client against 50 sessions of another, whatever those send."""
    got = simulate({"crowd": (50, rows), "single": (1, 10**6)}, 100)
    assert abs(got["crowd"] - got["single"]) <= 3 * BUDGET, got
    assert got.total() > 99 * (BUDGET - MAX_STEP_ROWS)


def test_what_one_does_not_take_others_get() -> None:
    got = simulate({"chat": (1, 1), "crowd": (50, 64), "other": (2, 64)}, 300)
    assert got["chat"] == 300
    assert abs(got["crowd"] - got["other"]) <= 2 * BUDGET
    assert got.total() == 300 * BUDGET


def test_idleness_saves_nothing_up() -> None:
    queue: FairQueue[Job] = FairQueue(BUDGET)
    queue.put(Job("early", 1))
    queue.put(Job("busy", 10**6))
    for _ in range(100):
        queue.pick(0.0)
    queue.put(Job("early", 10**6))
    got: Counter[str] = Counter()
    for _ in range(10):
        got.update(rows_of(queue.pick(0.0)))
    assert abs(got["early"] - got["busy"]) <= 2 * BUDGET


def test_expired_and_withdrawn_jobs_are_not_computed() -> None:
    queue: FairQueue[Job] = FairQueue(BUDGET)
    late, gone, prompt = Job("a", 4, deadline=1.0), Job("a", 4), Job("b", 100)
    for job in (late, gone, prompt):
        queue.put(job)
    gone.withdrawn = True
    turn = queue.pick(1.5)
    assert turn.refused == [late, gone]
    assert turn.picked == [(prompt, 64)]
    prompt.withdrawn = True  # between two pieces
    turn = queue.pick(1.5)
    assert (turn.refused, turn.picked, len(queue)) == ([prompt], [], 0)


def test_what_cannot_be_cut_goes_whole_and_without_other_bulk() -> None:
    queue: FairQueue[Job] = FairQueue(BUDGET)
    jobs = [Job(payer, rows, divisible=False) for payer, rows in (("a", 40), ("b", 40), ("c", 200), ("d", 20))]
    for job in jobs:
        queue.put(job)
    turns = [[job for job, _ in queue.pick(0.0).picked] for _ in range(4)]
    assert turns == [[jobs[0]], [jobs[1]], [jobs[2]], [jobs[3]]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 300), st.booleans()), max_size=12),
        min_size=1,
        max_size=40,
    )
)
def test_every_job_is_computed_once_in_order_and_nobody_gets_far_ahead(
    arrivals: list[list[tuple[str, int, bool]]],
) -> None:
    """Arrivals of each turn: (payer, rows, divisible)."""
    queue: FairQueue[Job] = FairQueue(BUDGET)
    size: dict[int, int] = {}
    number: dict[int, int] = {}
    done: Counter[int] = Counter()
    finished: dict[tuple[str, bool], list[int]] = {}
    jobs: list[Job] = []
    served: Counter[str] = Counter()
    since: dict[str, Counter[str]] = {}  # what everybody had been served when a payer began to wait
    turn_number = 0
    while turn_number < len(arrivals) or len(queue):
        for payer, rows, divisible in arrivals[turn_number] if turn_number < len(arrivals) else ():
            job = Job(payer, rows, divisible)
            size[id(job)] = rows
            number[id(job)] = len(jobs)
            jobs.append(job)
            queue.put(job)
        turn_number += 1
        assert turn_number < 5000, "somebody waits for ever"
        turn = queue.pick(0.0)
        bulk = [count for job, count in turn.picked if size[id(job)] > MAX_STEP_ROWS]
        whole = [count for job, count in turn.picked if not job.divisible and count > MAX_STEP_ROWS]
        assert sum(count for _, count in turn.picked) <= BUDGET or (whole and len(bulk) == 1)
        for job, count in turn.picked:
            served[job.payer] += count
            done[id(job)] += count
            if not job.rows:
                kind = size[id(job)] <= MAX_STEP_ROWS
                finished.setdefault((job.payer, kind), []).append(number[id(job)])
        waiting = {job.payer for job in jobs if done[id(job)] < size[id(job)]}
        since = {payer: since.get(payer, served.copy()) for payer in waiting}
        for payer, before in since.items():
            own = served[payer] - before[payer]
            for other in served:
                assert served[other] - before[other] - own <= 4 * BUDGET + 2 * 300, (payer, other)
    assert done == size
    assert all(order == sorted(order) for order in finished.values())


def test_load_says_how_long_what_waits_will_take() -> None:
    meter = Meter()
    assert meter.load(3, 100).backlog_s == 0.0
    for _ in range(50):
        meter.note(rows=20, sessions=5, seconds=0.1)
    load = meter.load(4, 400)
    assert load.rows_per_s == pytest.approx(200)
    assert [load.step_s, load.batch, load.backlog_s] == pytest.approx([0.1, 5, 2.0])
    assert [meter.forwards, meter.rows, meter.busy_s] == pytest.approx([50, 1000, 5.0])


def test_steps_and_prompts_are_averaged_apart_and_parts_count_as_the_whole_span() -> None:
    meter = Meter()
    assert (meter.load(0, 0).single_s, meter.load(0, 0).bulk_row_s) == (None, None)
    for seconds in (0.03, 0.01):
        meter.note(2, 2, seconds)
    meter.note(1, 1, 0.005, share=0.25)
    meter.note(33, 2, 0.066, share=0.5)
    load = meter.load(0, 0)
    assert load.single_s == pytest.approx(0.02) and load.bulk_row_s == pytest.approx(0.004)
    for _ in range(100):
        meter.note(1, 1, 0.1)
    assert meter.load(0, 0).single_s == pytest.approx(0.1, rel=0.01)


def test_steps_wait_for_companions_longer_than_for_others_and_not_for_more_than_half() -> None:
    company = Company()
    assert company.waits_s({0}, 0.0) == 0, "one that is alone waits for nobody"
    company.note(range(3), 1.0)
    company.note(range(3, 8), 1.0)
    assert company.half({0}, 1.0) == 4
    assert company.waits_s({0, 1}, 1.0) == LAG_S, "the third was with them"
    assert company.waits_s({0, 1, 2}, 1.0) == GAP_S, "all are there, but there may be more"
    assert company.waits_s({0, 1, 2, 3}, 1.0) == 0
    company.note([0, 1], 1.1)
    assert company.waits_s({0, 1}, 1.1) == GAP_S, "who was not there is not waited for again"
    assert company.waits_s({0, 2}, 1.1) == LAG_S
    assert company.waits_s({9}, 1.1) == GAP_S, "a new one"
    company.note([3, 4, 5], 1.1)
    assert company.waits_s({6, 7}, 1.1) == GAP_S, "whose companions have gone on without it"


def test_sessions_are_at_work_for_as_long_as_their_steps_are_apart() -> None:
    company = Company()
    company.note(range(8), 1.0)
    company.note([0, 1], 1.4)
    assert company.half({0}, 1.0 + RECENT_S + 0.01) == 1
    for at in (1.4, 1.85, 2.9, 5.5, 12.0):
        company.note([0, 1, 2, 3], at)
    company.note([5, 6, 7], 12.0)
    assert company.half({0}, 12.1) == 4
    assert company.half({0}, 30.0) == 2, "three have not come again"
    assert company.half(set(range(16)), 30.0) == 8, "all that wait count"
    company.note([0, 1], 9e4)
    assert company.half({0}, 9e4 + 0.6) == 1, "a night tells nothing of how far apart steps are"


def test_a_company_forgets_who_is_gone_though_nobody_asks() -> None:
    company = Company()
    for at in range(1000):
        company.note([at], at * 10.0)
    assert len(company._last) == len(company._until) == len(company._companions) == 1


def test_no_more_steps_are_picked_than_are_asked_for_and_none_is_passed_over() -> None:
    waiting: FairQueue[Job] = FairQueue(96)
    jobs = [Job(f"payer {at % 2}", 1) for at in range(9)]
    for job in jobs:
        waiting.put(job)
    found = [[job for job, _ in waiting.pick(0.0, 4).picked] for _ in range(3)]
    assert [len(one) for one in found] == [4, 4, 1] and not len(waiting)
    assert {id(job) for one in found for job in one} == {id(job) for job in jobs}
    assert [job.payer for job in found[0]].count("payer 0") == 2, "fair within what is picked"
