"""Evidence is kept until no stake answers for it, within a budget; what else a store holds is left alone."""

from __future__ import annotations

import io
import json
import struct
import time
from pathlib import Path

import pytest

from harness import samples
from harness.claims import claim
from tallystick.court.accusing import load_evidence
from tallystick.court.keeping import keep_evidence, prune
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.content.unixfs import Profile
from tallystick_protocol.errors import BadEvidence, ConfigError
from tallystick_protocol.evidence.bundle import KEPT_S
from tallystick_protocol.receipts import Context

HERE = Path(__file__).resolve().parents[2]
NOW = int(time.time())


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path, profile=Profile("small", chunk_bytes=1000, width=8))


def bundle(at: int, positions: int = 40) -> bytes:
    ids = [(one % 4).to_bytes(4, "little") for one in range(positions)]
    outputs = [struct.pack("<IfIf", 1, 1.0, 2, 0.5)] * positions
    signed = samples.receipt(at=at)
    context = Context("fp32", "f32", 2, ())
    return claim(signed, ids, outputs, [True] * positions, context=context, key=samples.key("hot")).encode()


def test_it_lasts_as_long_as_a_stake_answers() -> None:
    parameters = json.loads((HERE / "contracts" / "parameters.json").read_text())
    assert str(KEPT_S) in json.dumps(parameters), "UNBONDING"


def test_what_is_too_old_is_dropped_when_more_comes_and_other_pins_stay(store: LocalStore, tmp_path: Path) -> None:
    piece = store.put_file(io.BytesIO(bytes(range(256)) * 40))
    store.pin(piece)
    old, young = keep_evidence(store, bundle(NOW - KEPT_S + 100)), keep_evidence(store, bundle(NOW))
    assert set(store.pins()) == {piece, old, young}
    assert prune(store, NOW + 99) == [] and prune(store, NOW + 101) == [old]
    assert set(store.pins()) == {piece, young} and not store.has(old)
    keep_evidence(store, bundle(NOW - KEPT_S - 1, 8))
    last = keep_evidence(store, bundle(NOW, 9))
    assert set(store.pins()) == {piece, young, last}
    assert store.read_file(young, tmp_path / "out", 1 << 20) == len(bundle(NOW))
    assert store.read_file(piece, tmp_path / "piece", 1 << 20) == 256 * 40


def test_no_more_is_kept_than_the_budget_allows_and_nothing_goes_for_it(store: LocalStore) -> None:
    first = keep_evidence(store, bundle(NOW), len(bundle(NOW)))
    assert keep_evidence(store, bundle(NOW), len(bundle(NOW))) == first, "the same again takes no more"
    room = len(bundle(NOW)) + len(bundle(NOW, 20))
    with pytest.raises(ConfigError, match=f"would take {room} bytes, {room - 1} may be kept"):
        keep_evidence(store, bundle(NOW, 20), room - 1)
    assert store.pins() == (first,)
    assert len(store.pins()) < len({first, keep_evidence(store, bundle(NOW, 20), room)})


def test_a_note_that_is_damaged_keeps_nothing_from_being_kept(store: LocalStore) -> None:
    cid = keep_evidence(store, bundle(NOW))
    (store.root / "evidence" / str(cid)).write_text("?")
    (store.root / "evidence" / "no cid").write_text("1 1")
    assert prune(store, NOW + 2 * KEPT_S) == []
    assert keep_evidence(store, bundle(NOW, 20)) in store.pins()
    with pytest.raises(BadEvidence):
        keep_evidence(store, b"TALYEVI1 and no more")


def test_a_file_that_a_person_brings_is_kept_the_same_way(store: LocalStore, tmp_path: Path) -> None:
    file = tmp_path / "bundle"
    file.write_bytes(bundle(NOW))
    evidence, cid = load_evidence(str(file), store, samples.STAKING)
    assert evidence.accused.at == NOW
    assert prune(store, NOW + KEPT_S) == [cid]
