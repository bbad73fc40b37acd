"""The sign-once journal and the till under SIGKILL: never two claims for one key, never a lost voucher."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import doomed_books, killing, samples
from tallystick_node.database import Database
from tallystick_node.journal import Journal, forget_now_and_then
from tallystick_protocol.errors import ConfigError, Equivocation
from tallystick_protocol.evidence.bundle import KEPT_S
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import digest, keccak, unseal
from tallystick_protocol.types import SessionId

HOT = samples.key("hot")
SESSION = SessionId(samples.digest("session"))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal.db", HOT, samples.STAKING)
    yield opened
    opened.close()


def test_what_is_signed_is_the_receipt_and_is_stored(journal: Journal, tmp_path: Path) -> None:
    sealed = journal.sign(samples.receipt())
    assert unseal(samples.STAKING, Receipt, sealed) == (samples.receipt(), HOT.address)
    rows = sqlite3.connect(tmp_path / "journal.db").execute("SELECT sealed, digest FROM receipts").fetchall()
    assert rows == [(sealed, digest(samples.STAKING, samples.receipt()))]
    assert journal.digest_of(samples.receipt()) == rows[0][1]


def test_the_same_claim_at_another_time_is_sent_again_and_not_signed_again(journal: Journal) -> None:
    first = journal.sign(samples.receipt(at=100))
    assert journal.sign(samples.receipt(at=200)) == first
    assert journal.receipts(SESSION) == [first]


@pytest.mark.parametrize(
    "changes",
    [{"output": samples.digest("x")}, {"input": samples.digest("x")}, {"previous": samples.digest("x")}, {"last": 20},
     {"first": 5}, {"context": samples.digest("x")}, {"start": 1}, {"end": 9}, {"model": samples.digest("x")},
     {"numeric_class": samples.digest("x")}, {"challenge": samples.digest("x")}, {"sketches": samples.digest("x")},
     {"node": samples.address("x")}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_claim_that_differs_in_any_field_is_refused(journal: Journal, changes: dict[str, object]) -> None:
    first = journal.sign(samples.receipt())
    with pytest.raises(Equivocation):
        journal.sign(samples.receipt(**changes))
    assert journal.receipts(SESSION) == [first]


@pytest.mark.parametrize(
    "changes",
    [{"revision": 1}, {"attempt": 1}, {"first": 32, "last": 64}, {"session": samples.digest("other")}],
    ids=str,
)
def test_another_key_is_signed(journal: Journal, changes: dict[str, object]) -> None:
    journal.sign(samples.receipt())
    assert journal.sign(samples.receipt(**changes, output=samples.digest("x")))


def test_a_restart_remembers_everything(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal.db", HOT, samples.STAKING)
    sealed = first.sign(samples.receipt())
    assert first.admit(SESSION, 0, 1000, 10)
    first.close()
    again = Journal(tmp_path / "journal.db", HOT, samples.STAKING)
    assert again.receipts(SESSION) == [sealed]
    assert not again.admit(SESSION, 0, 1000, 10)
    with pytest.raises(Equivocation):
        again.sign(samples.receipt(output=samples.digest("x")))
    again.close()


def test_receipts_come_in_the_order_of_attempts_windows_and_revisions(journal: Journal) -> None:
    keys = [(a, w, r) for a in (0, 1) for w in (0, 1, 9) for r in (0, 1, 10)]
    for attempt, window, revision in reversed(keys):
        journal.sign(samples.receipt(attempt=attempt, first=32 * window, last=32 * window + 32, revision=revision))
    found = [unseal(samples.STAKING, Receipt, sealed)[0] for sealed in journal.receipts(SESSION)]
    assert [(r.attempt, r.first // 32, r.revision) for r in found] == keys
    assert journal.receipts(SessionId(samples.digest("other"))) == []


def test_a_session_is_admitted_once_and_forgotten_after_it_expires(journal: Journal) -> None:
    assert journal.admit(SESSION, 0, 100, 10)
    assert not journal.admit(SESSION, 0, 200, 100)
    assert journal.admit(SESSION, 1, 100, 10)
    assert journal.admit(SESSION, 0, 300, 101)


def test_receipts_are_forgotten_a_session_at_a_time_and_not_while_it_goes_on(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tallystick_node.journal.FORGOTTEN_AT_ONCE", 2)
    old = [SessionId(samples.digest(f"old {at}")) for at in range(5)]
    for session in old:
        journal.sign(samples.receipt(session=session, at=1000))
        journal.sign(samples.receipt(session=session, first=32, last=64, at=1999))
    goes_on = SessionId(samples.digest("goes on"))
    first = journal.sign(samples.receipt(session=goes_on, at=1000))
    journal.sign(samples.receipt(session=goes_on, first=32, last=64, at=2000))
    assert journal.forget(1999) == 0
    assert journal.forget(2000) == 10
    assert [len(journal.receipts(session)) for session in (*old, goes_on)] == [0] * 5 + [2]
    assert journal.receipts(goes_on)[0] == first
    with pytest.raises(Equivocation):
        journal.sign(samples.receipt(session=goes_on, output=samples.digest("another")))


async def test_a_journal_that_cannot_forget_stops_nobody(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = asyncio.Event()
    loop = asyncio.get_running_loop()

    def full(_: int) -> int:
        loop.call_soon_threadsafe(tried.set)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(journal, "forget", full)
    upkeep = asyncio.create_task(forget_now_and_then(journal, every_s=0.0))
    for _ in range(2):
        tried.clear()
        await asyncio.wait_for(tried.wait(), 10)
    assert not upkeep.done()
    upkeep.cancel()


async def test_a_node_forgets_what_no_stake_answers_for(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.sign(samples.receipt(at=int(time.time()) - KEPT_S - 10))
    young = SessionId(samples.digest("young"))
    journal.sign(samples.receipt(session=young, at=int(time.time()) - KEPT_S + 1000))
    upkeep = asyncio.create_task(forget_now_and_then(journal))
    async with asyncio.timeout(10):
        while journal.receipts(samples.receipt().session):
            await asyncio.sleep(0.01)
    upkeep.cancel()
    assert len(journal.receipts(young)) == 1


def test_two_threads_never_sign_two_claims_for_one_key(tmp_path: Path) -> None:
    journals = [Journal(tmp_path / "journal.db", HOT, samples.STAKING) for _ in range(2)]
    signed: list[tuple[int, bytes]] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait(timeout=10)
        for revision in range(10):
            claim = samples.receipt(revision=revision, output=keccak(f"{number} {revision}".encode()))
            try:
                signed.append((revision, journals[number % 2].sign(claim)))
            except Equivocation:
                continue

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(revision for revision, _ in signed) == list(range(10))
    for journal in journals:
        journal.close()


def test_a_failed_transaction_leaves_nothing_behind_and_the_database_usable(tmp_path: Path) -> None:
    database = Database(tmp_path / "d.db", "CREATE TABLE IF NOT EXISTS t(x INTEGER PRIMARY KEY);", 1)
    with pytest.raises(ZeroDivisionError), database.transaction() as db:
        db.execute("INSERT INTO t VALUES(1)")
        raise ZeroDivisionError
    assert database.read("SELECT * FROM t") == []
    with database.transaction() as db:
        db.execute("INSERT INTO t VALUES(2)")
    assert database.read("SELECT * FROM t") == [(2,)]


def test_a_commit_that_fails_is_rolled_back_and_the_database_stays_usable(tmp_path: Path) -> None:
    schema = """CREATE TABLE IF NOT EXISTS a(x INTEGER PRIMARY KEY);
    CREATE TABLE IF NOT EXISTS b(x INTEGER REFERENCES a(x) DEFERRABLE INITIALLY DEFERRED); PRAGMA foreign_keys=ON;"""
    database = Database(tmp_path / "d.db", schema, 1)
    with pytest.raises(sqlite3.IntegrityError), database.transaction() as db:
        db.execute("INSERT INTO b VALUES(1)")  # fails at COMMIT, as a full disk may
    with database.transaction() as db:
        db.execute("INSERT INTO a VALUES(1)")
    assert database.read("SELECT count(*) FROM b") == [(0,)]


def test_a_full_disk_raises_what_happened_and_the_database_stays_usable(tmp_path: Path) -> None:
    database = Database(tmp_path / "d.db", "CREATE TABLE IF NOT EXISTS t(x BLOB);", 1)
    database.read("PRAGMA max_page_count=4")
    with pytest.raises(sqlite3.OperationalError, match="full"), database.transaction() as db:
        db.execute("INSERT INTO t VALUES(zeroblob(100000))")
    with database.transaction() as db:
        db.execute("INSERT INTO t VALUES(x'00')")
    assert database.read("SELECT count(*) FROM t") == [(1,)]


@pytest.mark.parametrize("content", [b"this is no database, but it is long enough for a header" * 20, None])
def test_a_file_that_is_no_database_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        (tmp_path / "journal.db").mkdir()
    else:
        (tmp_path / "journal.db").write_bytes(content)
    with pytest.raises(ConfigError, match=r"journal\.db"):
        Journal(tmp_path / "journal.db", HOT, samples.STAKING)


def test_a_database_of_another_version_is_not_touched(tmp_path: Path) -> None:
    newer = sqlite3.connect(tmp_path / "journal.db")
    newer.execute("PRAGMA user_version=2")
    newer.close()
    with pytest.raises(ConfigError, match="use the program that wrote it"):
        Journal(tmp_path / "journal.db", HOT, samples.STAKING)
    assert sqlite3.connect(tmp_path / "journal.db").execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def test_every_commit_is_synced_to_the_disk(tmp_path: Path) -> None:
    database = Database(tmp_path / "d.db", "", 1)
    assert database.read("PRAGMA synchronous") == [(2,)]
    assert database.read("PRAGMA journal_mode") == [("wal",)]


# An opening takes some ten statements, or forty calls, and a round half as many: the boundaries of both are hit.
FATAL = {"statements": range(3, 43, 2), "calls": range(1, 81)}

Doomed = Callable[[int], tuple[list[str], int, str]]


@pytest.fixture(params=FATAL)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "calls" and not killing.IS_POSSIBLE:
        pytest.skip("system calls are counted on Linux, x86-64")
    return str(request.param)


@pytest.fixture
def doomed(tmp_path: Path, kind: str) -> Iterator[Doomed]:
    """doomed(n): what a process said until it was killed at its n-th statement or call, its wait status, and where."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "harness.doomed_books", str(tmp_path), kind]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        reader, writer = process.stdout, process.stdin

        def run(fatal: int) -> tuple[list[str], int, str]:
            writer.write(f"{fatal}\n")
            writer.flush()
            lines: list[str] = []
            for line in reader:
                if line.startswith("dead "):
                    return lines, int(line.split()[1]), line.split()[2]
                lines.append(line)
            raise AssertionError("the parent of the doomed processes has ended")

        yield run
        writer.close()
        process.wait(timeout=10)


def test_whatever_is_killed_when_no_key_has_two_claims_and_no_accepted_voucher_is_lost(
    tmp_path: Path, kind: str, doomed: Doomed
) -> None:
    seen: dict[int, str] = {}
    highest, spent = 0, 0
    places = set()
    for fatal in FATAL[kind]:
        lines, status, place = doomed(fatal)
        places.add(place)
        assert os.WTERMSIG(status) == signal.SIGKILL
        for line in lines:
            what, number, *rest = line.split()
            if what == "voucher":
                highest, spent = max(highest, int(number)), spent + 1
            else:
                assert seen.setdefault(int(number), rest[0]) == rest[0], f"two claims for revision {number}"
        till, journal = doomed_books.open_till(tmp_path), doomed_books.open_journal(tmp_path)
        account = till.account(doomed_books.CLIENT.address)
        assert account.signed in (highest, highest + doomed_books.STEP), "the one in flight may be in"
        highest = account.signed
        assert account.owed >= spent * doomed_books.COST, "owed is durable before a voucher is taken here"
        sealed = journal.receipts(SESSION)
        assert [unseal(samples.STAKING, Receipt, one)[0].revision for one in sealed] == list(range(len(sealed)))
        for revision, said in seen.items():
            assert keccak(sealed[revision]).hex() == said
        till.close()
        journal.close()
    assert places >= ({"statement"} if kind == "statements" else {"pwrite64", "fdatasync", "write"})
    assert len(seen) > 5
    assert highest > 5 * doomed_books.STEP
