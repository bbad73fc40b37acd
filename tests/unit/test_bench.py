"""The bench's own arithmetic: medians and ranges, what a thread is at work on, what llama.cpp prints."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import TypeVar

import pytest

from harness import checkpoints, samples
from tallystick.session.remote import Remote
from tallystick_devnet.bench import routes
from tallystick_devnet.bench.accounts import Account, Sampler, counted, divided, kind_of
from tallystick_devnet.bench.asking import Timed, longest_stall, rate_together
from tallystick_devnet.bench.cli import HEADLINES, measure
from tallystick_devnet.bench.figures import Measured, first_repeat, ratios, spread
from tallystick_devnet.bench.llamacpp import LlamaCpp, decode_rate, start_llamacpp, together_rate
from tallystick_devnet.bench.network import equal_spans, no_vouchers_over_nothing, wait_for_rest
from tallystick_devnet.bench.plan import QUICK, Bench
from tallystick_devnet.bench.sampled_node import Accountant
from tallystick_devnet.bench.sections import SECTIONS, Section
from tallystick_devnet.bench.texts import text_ids
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.receipts import leaf, merkle_root
from tallystick_protocol.signing import Key, seal, unseal
from tallystick_protocol.types import Span
from tallystick_protocol.vouchers import Voucher

T = TypeVar("T")
WAIT_S = 10.0

# -- arithmetic


def test_a_figure_is_the_median_with_its_range() -> None:
    assert spread("x", [3.0, 1.0, 9.0]) == {"x": 3.0, "x_low": 1.0, "x_high": 9.0}
    assert spread("x", []) == {"x": None, "x_low": None, "x_high": None}
    assert ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [])


def test_measurements_keep_their_order_and_what_failed_is_none() -> None:
    measured = Measured(["first", "second"])
    measured.note("second", 2.0)
    measured.note("third", 1.0)
    measured.note("third", 3.0)
    figures = measured.figures()
    assert list(figures)[::3] == ["first", "second", "third"]
    assert figures["first"] is None and figures["third"] == 2.0
    assert measured.last("ir") == "third 3"


def test_spans_of_the_bench_cover_all_layers() -> None:
    assert equal_spans(6, 4) == [Span(0, 2), Span(2, 3), Span(3, 4), Span(4, 6)]
    assert equal_spans(12, 1) == [Span(0, 12)]


def test_a_section_without_nodes_waits_for_none() -> None:
    wait_for_rest([], timeout_s=30)  # raises ProcessFailed otherwise


def test_a_rate_leaves_the_first_token_out_and_a_settled_one_counts_to_the_end() -> None:
    run = Timed(None, [1.0, 1.5, 2.0, 2.5], 4.0)  # type: ignore[arg-type]
    assert (run.first_s, run.token_s, run.rate, run.settled_rate) == (1.0, 0.5, 2.0, 1.0)


def test_streams_are_counted_while_all_of_them_run() -> None:
    early, late = [0.0, 1.0, 2.0, 3.0], [2.0, 2.5, 3.0, 3.5, 4.0]
    assert rate_together([early, late]) == 3.0  # of both, from 2 to 3: at 3, 2.5 and 3
    assert rate_together([[0.0, 1.0], [2.0, 3.0]]) == 1.0  # never at once


def test_a_stall_counts_from_the_kill_on() -> None:
    assert longest_stall([0.0, 5.0, 5.5, 6.0, 7.0], since=5.6) == 1.0
    assert longest_stall([0.0, 5.0, 5.1], since=4.0) == 1.0
    assert longest_stall([0.0, 1.0], since=2.0) == 0.0


def test_a_text_repeats_itself_where_eight_ids_stand_that_stood_there_before() -> None:
    period = [7, 8, 9]
    text = list(range(20)) + period * 6
    at = first_repeat(text, start=20)
    assert at is not None and text[at - 8 : at] == text[at - 11 : at - 3] and at == 20 + 8 + 3
    assert first_repeat(list(range(60)), start=20) is None
    quoted = list(range(10)) * 2
    assert first_repeat(quoted, start=10) == 18


def test_the_demo_models_text_is_made_of_its_own_tokens() -> None:
    ids = text_ids(Path(__file__).resolve().parents[2] / "models" / "tallystick-demo", 4096)
    assert len(ids) > 500 and max(ids) < 4096
    assert text_ids(Path("/nowhere"), 4096) == []


# -- accounts of a process's time


def _within(file: str, call: Callable[[], T]) -> Callable[[], T]:
    """The call, made by a function that stands in this file."""

    def here() -> T:
        return call()

    return FunctionType(here.__code__.replace(co_filename=file), globals(), closure=here.__closure__)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["/a/tallystick_node/scheduling/engine.py", "/a/tallystick_model/span.py"], "model"),
        (["/a/tallystick_model/span.py", "/a/torch/nn/functional.py"], "model"),
        (["/a/tallystick_node/session/steps.py", "/a/tallystick_protocol/receipts.py"], "hashing"),
        (["/a/tallystick_node/session/signer.py", "/a/tallystick_node/journal.py"], "signing"),
        (["/a/uvicorn/server.py", "/a/asyncio/runners.py"], "framing"),
        (["/a/asyncio/runners.py", "/a/tallystick_protocol/frames.py"], "framing"),
        (["/a/tallystick_model/span.py", "/a/numpy/core.py"], "model"),
        (["/a/tallystick_model/span.py", "/a/threading.py"], "waiting"),
        (["/a/nobody.py"], "other"),
    ],
)
def test_the_innermost_known_frame_says_what_a_thread_is_at_work_on(files: list[str], kind: str) -> None:
    look: Callable[[], str] = lambda: kind_of(sys._getframe(1))  # noqa: E731
    for file in reversed(files):
        look = _within(file, look)
    assert look() == kind


def test_a_thread_of_native_code_is_the_models() -> None:
    assert kind_of(None) == "model"


def test_cpu_time_is_divided_by_what_was_seen() -> None:
    assert divided(2.0, {"model": 3, "hashing": 1}) == {"model": 1.5, "hashing": 0.5}
    assert divided(2.0, {}) == {"other": 2.0}


def test_an_idle_device_thread_waits_and_a_busy_one_is_the_model() -> None:
    jobs: queue.SimpleQueue[None] = queue.SimpleQueue()
    stop = threading.Event()

    def _take_in() -> None:
        jobs.get()

    def burn() -> None:
        while not stop.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=_take_in), threading.Thread(target=_within("/tallystick_model/x.py", burn))]
    sampler = Sampler(0.002)
    try:
        for thread in (*threads, sampler):
            thread.start()
        began = time.thread_time()
        _wait_until(lambda: _used(sampler, threads[1]) > 0.2)
        account = sampler.end()
    finally:
        stop.set()
        jobs.put(None)
        for thread in threads:
            thread.join()
    own = time.thread_time() - began
    assert account.cpu_s["model"] > 0.19
    assert account.busy_s - account.cpu_s["model"] < own + 0.1
    assert _used(sampler, threads[0]) < 0.05


def _used(sampler: Sampler, thread: threading.Thread) -> float:
    tid = thread.native_id or 0
    return sampler._last.get(tid, 0.0) - sampler._first.get(tid, 0.0)


def _wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline, "nothing was seen in time"
        time.sleep(0.005)


def test_waiting_is_what_is_left_of_the_wall_clock() -> None:
    account = Account(10.0, {"model": 3.0, "framing": 1.0}, {"sha256": 4})
    assert account.busy_s == 4.0 and account.waiting == 0.6 and account.share("model") == 0.75
    assert Account.from_json(account.to_json()) == account
    assert Account(1.0, {"model": 1.5}).waiting == 0.0 and Account(1.0).share("model") == 0.0


def test_signatures_and_hashes_are_counted_and_then_left_alone() -> None:
    before = hashlib.sha256, Key.sign
    key = samples.key("client")
    with counted() as counts:
        merkle_root([leaf(b"a"), leaf(b"b")])
        sealed = seal(samples.ESCROW, Voucher(key.address, key.address, 1), key)
        unseal(samples.ESCROW, Voucher, sealed)
    assert (counts["sha256"], counts["signatures"], counts["checks"]) == (3, 1, 1)
    assert counts["keccak"] > 2
    assert (hashlib.sha256, Key.sign) == before


def test_a_node_looks_at_itself_between_two_signals_only(tmp_path: Path) -> None:
    accountant, path = Accountant(tmp_path / "account.json"), tmp_path / "account.json"
    accountant.turn()
    assert Account.from_json(path.read_text()) == Account()
    leaf(b"counted")
    accountant.turn()
    leaf(b"not counted")
    account = Account.from_json(path.read_text())
    assert account.counts["sha256"] == 1 and account.wall_s > 0
    assert not any(isinstance(thread, Sampler) for thread in threading.enumerate())


# -- llama.cpp


def test_rates_are_read_out_of_what_llamacpp_prints() -> None:
    tests = [{"n_prompt": 512, "n_gen": 0, "avg_ts": 700.0}, {"n_prompt": 0, "n_gen": 64, "avg_ts": 55.5}]
    assert decode_rate(json.dumps(tests)) == 55.5
    with pytest.raises(IndexError):
        decode_rate("[]")
    lines = ["main: n_kv_max = 1", '{"pl": 16, "speed_pp": 400.0, "speed_tg": 265.0}', '{"pl": 32, "speed_tg": 361.0}']
    assert together_rate("\n".join(lines), 32) == 361.0
    with pytest.raises(ValueError, match="16 sequences"):
        together_rate("main: out of memory", 16)


SERVER = f"""#!{sys.executable}
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("-p") + 1]))) as server:
    while True:
        server.accept()
"""
BENCH = """#!/bin/sh
echo '[{"n_gen": 24, "avg_ts": 50.5}]'
"""
BROKEN = """#!/bin/sh
echo 'ggml: no such device' >&2
exit 3
"""


def _programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Programs of these names, and no others of theirs, on the PATH."""
    for name, text in texts.items():
        program = folder / name.replace("_", "-")
        program.write_text(text)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


def test_llamacpp_is_measured_over_servers_and_a_program_that_fails_gives_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoints.llama(tmp_path / "checkpoint", hidden_size=96, intermediate_size=128, num_hidden_layers=1)
    _programs(tmp_path, monkeypatch, rpc_server=SERVER, llama_bench=BENCH, llama_batched_bench=BROKEN)
    said: list[str] = []
    with ExitStack() as stack:
        llama = start_llamacpp(checkpoint, tmp_path, stack, said.append)
        assert llama is not None and llama.decode(24) == 50.5
        assert llama.together(16, 64, 64) is None
    assert len(said) == 1 and "no such device" in said[0]


@pytest.mark.parametrize("server", [BROKEN, SERVER])
def test_servers_that_do_not_start_or_weights_that_cannot_be_written_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    checkpoint = checkpoints.llama(tmp_path / "checkpoint", hidden_size=96, intermediate_size=128, num_hidden_layers=1)
    if server == SERVER:
        (checkpoint / "model.safetensors").unlink()
    _programs(tmp_path, monkeypatch, rpc_server=server, llama_bench=BENCH)
    said: list[str] = []
    with ExitStack() as stack:
        assert start_llamacpp(checkpoint, tmp_path, stack, said.append) is None
    assert len(said) == 1 and said[0].startswith("llama.cpp is not measured")


def test_without_its_programs_llamacpp_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _programs(tmp_path, monkeypatch)
    said: list[str] = []
    with ExitStack() as stack:
        assert start_llamacpp(tmp_path, tmp_path, stack, said.append) is None
    assert "not on the PATH" in said[0]
    assert LlamaCpp(tmp_path, [1], said.append).together(16, 8, 8) is None


# -- the run


def test_a_section_that_fails_says_so_and_the_figures_of_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(_: Bench) -> dict[str, float | None]:
        raise NoRoute("nobody serves layers 0:3")

    async def works(_: Bench) -> dict[str, float | None]:
        return {"failover_s": 0.5}

    monkeypatch.setitem(SECTIONS, "generate", Section(fails))
    monkeypatch.setitem(SECTIONS, "failover", Section(works))
    said: list[str] = []
    bench = Bench(None, None, None, QUICK, said.append, random.Random(1), [])  # type: ignore[arg-type]
    figures, failed = measure(["generate", "failover"], bench)
    assert failed == ["generate"] and figures["failover_s"] == 0.5 and figures["nodes4_vs_generate"] is None
    assert set(HEADLINES) <= set(figures) and "  failed: nobody serves layers 0:3" in said


async def test_nodes_that_ask_for_nothing_are_sent_no_voucher() -> None:
    class Hop:
        rows_paid = 0

        class candidate:
            class offer:
                price = 0

    pay, hop = Remote.pay, Hop()
    with no_vouchers_over_nothing():
        await Remote.pay(hop, 32, None)  # type: ignore[arg-type]
    assert hop.rows_paid == 32 and Remote.pay is pay


async def test_of_a_village_most_of_which_is_dead_the_living_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "NODES", 40)
    monkeypatch.setattr(routes, "ALIVE", 12)
    monkeypatch.setattr(routes, "LAYERS", 4)
    monkeypatch.setattr(routes, "MODEL", replace(routes.MODEL, layers=4))
    found = await routes.routes(1)
    assert 3 <= found["survey1000_answered"] <= 12 and found["plan1000_s"] > 0
