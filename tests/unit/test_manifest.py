"""Manifests: one canonical block, every field bounded, ids as the contracts compute them."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from harness import samples
from tallystick_protocol import canonical_json
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import MAX_BYTES, Manifest, Piece, model_id, weights_root
from tallystick_protocol.signing import keccak
from tallystick_protocol.types import Digest, Span

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "eip712.json").read_text())["models"]
SAMPLE = samples.manifest()
VALID: dict[str, Any] = json.loads(SAMPLE.to_bytes())
DELETE = object()
LINK = {"/": str(Cid.of_raw(b"x"))}


def changed(path: str, value: Any) -> bytes:
    """The valid manifest with the value at "a.0.b" replaced or deleted."""
    tree: Any = copy.deepcopy(VALID)
    *parents, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    inner = tree
    for step in parents:
        inner = inner[step]
    if value is DELETE:
        del inner[last]
    else:
        inner[last] = value
    return canonical_json.encode(tree)


def test_a_manifest_comes_back_as_it_was() -> None:
    block = SAMPLE.to_bytes()
    assert Manifest.from_bytes(block) == SAMPLE
    assert Manifest.from_bytes(block).to_bytes() == block
    assert hashlib.sha256(block).digest() == SAMPLE.digest == SAMPLE.cid.digest
    assert SAMPLE.cid.codec is Codec.RAW


def test_an_embedding_model_comes_back_as_it_was() -> None:
    manifest = samples.manifest(output="hidden", causal=False, pooling=None, tied={}, generation={}, tokenizer={})
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@pytest.mark.parametrize("case", VECTORS["weights"], ids=lambda case: f"{len(case['pieces'])} pieces")
def test_the_weights_root_is_the_one_that_the_contract_computes(case: dict[str, Any]) -> None:
    pieces = [
        Piece("layer", index, Cid(Codec.DAG_PB, bytes.fromhex(piece["cidDigest"][2:])), int(piece["bytes"]), {})
        for index, piece in enumerate(case["pieces"])
    ]
    assert "0x" + weights_root(pieces).hex() == case["root"]


@pytest.mark.parametrize("case", VECTORS["id"], ids=lambda case: f"{case['layers']} layers")
def test_model_ids_are_those_of_the_contract(case: dict[str, str]) -> None:
    manifest, weights = (Digest(bytes.fromhex(case[key][2:])) for key in ("manifest", "weights"))
    assert "0x" + model_id(manifest, weights, int(case["layers"])).hex() == case["id"]


@pytest.mark.parametrize("num_pieces", [1, 2, 3, 5, 8, 13])
def test_the_weights_root_is_that_of_an_independent_recursion(num_pieces: int) -> None:
    def word(number: int) -> bytes:
        return number.to_bytes(32, "big")

    def root(level: list[bytes]) -> bytes:
        if len(level) == 1:
            return level[0]
        return root([keccak(b"".join(sorted(p))) if len(p := level[i : i + 2]) == 2 else p[0]
                     for i in range(0, len(level), 2)])  # fmt: skip

    pieces = [Piece("layer", i, Cid.of_raw(bytes([i])), 1000 + i, {}) for i in range(num_pieces)]
    leaves = [keccak(keccak(word(i) + p.cid.digest + word(p.bytes))) for i, p in enumerate(pieces)]
    assert weights_root(pieces) == root(list(leaves))


def test_every_piece_its_place_and_its_length_count_for_the_weights() -> None:
    pieces = SAMPLE.pieces
    longer = [*pieces[:-1], Piece("head", 0, pieces[-1].cid, pieces[-1].bytes + 1, {})]
    assert len({weights_root(p) for p in (pieces, pieces[::-1], pieces[:-1], longer)}) == 4


def test_the_model_id_is_the_keccak_of_three_words() -> None:
    words = SAMPLE.digest + SAMPLE.weights + (2).to_bytes(32, "big")
    assert bytes(SAMPLE.model_id) == keccak(words)


def names(pieces: tuple[Piece, ...]) -> list[str]:
    return [piece.name for piece in pieces]


def test_a_span_gets_its_layers_and_the_ends_get_theirs() -> None:
    assert names(SAMPLE.span_pieces(Span(0, 2))) == ["embed", "layer.0", "layer.1", "shared", "head"]
    assert names(SAMPLE.span_pieces(Span(0, 1))) == ["embed", "layer.0", "shared"]
    assert names(SAMPLE.span_pieces(Span(1, 2))) == ["embed", "layer.1", "shared", "head"]  # the tied head reads embed
    untied = samples.manifest(tied={})
    assert names(untied.span_pieces(Span(1, 2))) == ["layer.1", "shared", "head"]


def test_a_span_beyond_the_model_is_refused_with_the_layers_there_are() -> None:
    with pytest.raises(ManifestError, match=r"has layers \[0, 2\), not \[1, 3\)"):
        SAMPLE.span_pieces(Span(1, 3))


def each(path: str, values: list[Any]) -> list[tuple[str, Any]]:
    return [(path, value) for value in values]


HOSTILE: list[tuple[str, Any]] = [
    *each("format", ["tallystick/2", None, [], {}, 1, DELETE]),
    *[
        (name, value)
        for name in ("layers", "width", "vocab", "max_length")
        for value in (0, -1, True, 2.0, "2", None, [], {}, 1 << 23, 10**400, 1e308, DELETE)
    ],
    ("layers", 1),
    ("layers", 3),
    *[
        (name, value)
        for name in ("name", "licence", "architecture")
        for value in ("", "a" * 201, "a\nb", "\x1b[2J", "a\0", "\u202e", 5, None, ["a"], {"a": 1}, True, DELETE)
    ],
    *[(name, value) for name in ("config", "generation", "tied") for value in (None, [], [["a", "b"]], "x", 5, DELETE)],
    *each("output", ["tokens", None, [], {}, True, DELETE]),
    *each("numerics", ["fp8", "FP32", None, [], {}, DELETE]),
    *each("causal", [0, 1, 1.0, "true", None, [], DELETE]),
    *each("pieces", [[], None, {}, "abc", 5, [None], [[]], [{}], DELETE]),
    *each("pieces/1/kind", ["embed", "head", "shared", "shard", "", None, [], {}, 1, True, DELETE]),
    *each("pieces/1/index", [1, -1, True, False, 0.0, "0", None, [], {}, DELETE]),
    *each("pieces/0/index", [1, False, 0.0, None, DELETE]),
    *each(
        "pieces/1/cid",
        [
            None,
            "bafk",
            LINK["/"],
            [],
            {},
            {"/": 5},
            {"/": []},
            {"/": "bafk"},
            {"/": ""},
            {"/": "z" * 10_000},
            {**LINK, "x": 1},
            {"/": str(Cid.of_raw(b"x")).upper()},
            DELETE,
        ],
    ),
    *each("pieces/1/bytes", [0, -1, True, 47, 200.0, "200", None, (1 << 40) + 1, 10**300, DELETE]),
    *each("pieces/1/tensors", [None, [], "x", {"l0": None}, {"l0": []}, {"l0": {}}, DELETE]),
    ("pieces/1/tensors", {"tokens": {"dtype": "F32", "shape": [1]}}),
    ("pieces/1/tensors", {f"t{i}": {"dtype": "U8", "shape": [0]} for i in range(4097)}),
    *each("pieces/1/tensors/l0/dtype", ["F64", "f32", "O", None, [], {}, True, DELETE]),
    *each(
        "pieces/1/tensors/l0/shape",
        [
            None,
            5,
            "12",
            "",
            {},
            {"1": 2},
            [-1],
            [True],
            [1.0],
            ["1"],
            [None],
            [[]],
            [1 << 33],
            [1] * 9,
            [1 << 32] * 8,
            [51],
            DELETE,
        ],
    ),
    ("pieces/1/tensors/l0/stride", [1]),
    ("pieces/1/extra", 1),
    *each("tied/head", ["l0", "nothing", "", None, 5, [], {}, ["tokens"]]),
    *each("tokenizer", [None, [], "x", 5, {"a": None}, {"a": []}, {"a": {}}, DELETE]),
    *[
        ("tokenizer", {name: {"cid": LINK, "bytes": 5}})
        for name in ("", "..", "../x", "a/b", "a\\b", "/etc/passwd", " a", "a ", "a\0", "a\nb", "\x1b[2J", "a" * 101)
    ],
    *each("tokenizer/tokenizer.json/bytes", [0, -1, True, "100", 1.5, None, (1 << 28) + 1, DELETE]),
    ("tokenizer/tokenizer.json/cid", {"/": 5}),
    ("tokenizer/tokenizer.json/mode", 1),
    *each("generation/eos", [1, "1", None, {}, [4], [-1], [True], [1.0], ["1"], [[1]], [None], [1 << 70], [0] * 65]),
    *each(
        "pooling",
        [
            [],
            {},
            "mean",
            5,
            True,
            {"mode": "mean"},
            {"mode": "max", "normalize": True},
            {"mode": [], "normalize": True},
            {"mode": "mean", "normalize": 1},
            {"mode": "mean", "normalize": "yes"},
            {"mode": "mean", "normalize": None},
            {"mode": "mean", "normalize": True, "x": 1},
            DELETE,
        ],
    ),
    *each(
        "norms",
        [
            None,
            [],
            {},
            5,
            "ab",
            [[0.0, 1.0]] * 2,
            [[0.0, 1.0]] * 4,
            [[0.0, 1.0], [0.0, 1.0], [1.0, 0.5]],
            [[0.0, 1.0], [0.0, 1.0], [-1.0, 0.5]],
            [[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]],
            [[0.0, 1.0], [0.0, 1.0], [0, 1]],
            [[0.0, 1.0], [0.0, 1.0], [0.0]],
            [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0, 2.0]],
            [[0.0, 1.0], [0.0, 1.0], [0.0, "1.0"]],
            [[0.0, 1.0], [0.0, 1.0], [0.0, 10**400]],
            [[0.0, 1.0], [0.0, 1.0], [False, True]],
            [[0.0, 1.0], [0.0, 1.0], [None, []]],
            [[0.0, 1.0], [0.0, 1.0], "01"],
            DELETE,
        ],
    ),
    *each("canary", [None, [], {}, 5, {"ids": [0], "rows": [LINK] * 3}, DELETE]),
    *each("canary/ids", [None, [], {}, "12", 5, [4], [-1], [True], [1.0], ["1"], [[0]], [1 << 70], [0] * 1025]),
    *each("canary/rows", [None, [], {}, "abc", [LINK] * 2, [LINK] * 4, [LINK, LINK, "x"], [LINK, LINK, {}]]),
    *each("canary/output", [None, [], {}, "x", {"/": None}]),
    ("canary/extra", 1),
    ("extra", 1),
]


@pytest.mark.parametrize(
    ("path", "value"), HOSTILE, ids=[f"{p}={'nothing' if v is DELETE else str(v)[:30]!r}" for p, v in HOSTILE]
)
def test_every_hostile_field_is_a_manifest_error_and_nothing_else(path: str, value: Any) -> None:
    with pytest.raises(ManifestError) as raised:
        Manifest.from_bytes(changed(path, value))
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("block", [b"", b"{}", b"[]", b"null", b"5", b'"x"', b"\xff", b'{"format":"tallystick/1"}'])
def test_what_is_no_manifest_at_all_is_a_manifest_error(block: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_bytes(block)


def test_a_spelling_that_is_not_canonical_is_refused_even_where_the_value_is_good() -> None:
    valid = SAMPLE.to_bytes()
    for block in (json.dumps(VALID).encode(), valid + b"\n", valid.replace(b"small", b"\\u0073mall")):
        with pytest.raises(ManifestError, match="canonical"):
            Manifest.from_bytes(block)


def test_a_cid_in_its_old_spelling_is_refused_because_the_digest_would_differ() -> None:
    old = "QmUNLLsPACCz1vLxQVkXqqLX5R1X345qqfHbsf67hvA3Nn"
    with pytest.raises(ManifestError):
        Manifest.from_bytes(changed("pieces/1/cid", {"/": old}))


def test_a_manifest_beyond_a_mebibyte_is_refused_on_both_sides() -> None:
    large = samples.manifest(config={"x": "a" * MAX_BYTES})
    with pytest.raises(ManifestError, match="limit"):
        large.to_bytes()
    with pytest.raises(ManifestError, match="limit"):
        Manifest.from_bytes(b" " * (MAX_BYTES + 1))


STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**64, 10**400, -(10**400), 0.0, -0.0, 1e308, 5e-324, "", "0", "a" * 300,
    "\0", "é", [], [[]], [None], {}, {"/": "x"}, {"": {}}, [[[[[[]]]]]], LINK, [LINK], "tokens", "embed", "F32",
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def test_a_manifest_changed_at_random_places_is_read_or_is_a_manifest_error() -> None:
    coins = random.Random(7)
    read = 0
    for _ in range(2500):
        tree = copy.deepcopy(VALID)
        for _ in range(coins.choice((1, 1, 1, 2, 3))):
            *parents, last = coins.choice(places(tree)[1:])
            inner = tree
            for step in parents:
                inner = inner[step]
            how = coins.randrange(4)
            if how == 0:
                del inner[last]
            elif how == 1 and isinstance(inner, dict):
                inner[coins.choice(["x", "", "/", "bytes", "mode"])] = coins.choice(STRANGE)
            elif how == 2 and isinstance(inner, list):
                inner.insert(last, copy.deepcopy(coins.choice([inner[last], coins.choice(STRANGE)])))
            else:
                inner[last] = copy.deepcopy(coins.choice(STRANGE))
            if len(places(tree)) == 1:
                break
        block = canonical_json.encode(tree)
        try:
            manifest = Manifest.from_bytes(block)
        except ManifestError:
            continue
        read += 1
        assert manifest.to_bytes() == block
        assert len(manifest.model_id) == 32
        for start in range(manifest.layers):
            assert manifest.span_pieces(Span(start, manifest.layers))
    assert 0 < read < 500


def test_a_surrogate_anywhere_is_a_manifest_error() -> None:
    for spelled in (b'"name":"\\ud800"', b'"name":"\xed\xa0\x80"'):
        with pytest.raises(ManifestError):
            Manifest.from_bytes(SAMPLE.to_bytes().replace(b'"name":"small"', spelled))
