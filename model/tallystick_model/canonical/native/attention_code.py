"""The code of `attention.py`, as LLVM's intermediate language. Two functions:

    attend(task*)                       new keys and values are put into caches, then all parts are computed
    parts(task*, begin, end)            parts [begin, end): a few rows of one session and one head each

The fields of a task and of its tables are `attention.py`'s.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tallystick_model.canonical.native.attention import (
    CHUNK,
    GROUPS,
    HEADS,
    KEY,
    KEY_GROUP,
    KEY_ROW,
    KEYS,
    NUM_UNITS,
    OUT,
    QUERY,
    QUERY_HEAD,
    QUERY_ROW,
    ROWS,
    SCALE,
    SEGMENTS,
    SINKS,
    TOGETHER,
    UNITS,
    VALUE,
    VALUE_GROUP,
    VALUE_ROW,
    WORK,
    WRITTEN,
)
from tallystick_model.canonical.native.code import (
    BYTES,
    FLOAT,
    FLOATS,
    INT,
    INTS,
    NOTHING,
    WORD,
    Code,
    Shared,
    declared,
)

LANES = CHUNK
"""Of every vector, on every processor: sums over keys, and over the values of a head, have so many parts."""

AHEAD = 8
"""Chunks of keys and values that are read before they are needed."""

_VECTOR, _WORDS, _BITS = (ir.VectorType(kind, LANES) for kind in (FLOAT, WORD, ir.IntType(1)))


def attention_module(key_dim: int, value_dim: int, shared_work: int | None) -> ir.Module:
    """shared_work: as `Shared` has it."""
    module = ir.Module("attention")
    shared = Shared(module, _parts(module, key_dim, value_dim), "attention", shared_work)
    code = Code(module, "attend", NOTHING, [INTS], public=True)
    (task,) = code.args
    _write(code, task, key_dim, value_dim)
    count = code.mul(code.field(task, NUM_UNITS), code.field(task, HEADS))
    shared.compute(code, task, count, code.number(1), code.field(task, WORK))
    return module


def _write(code: Code, task: Any, key_dim: int, value_dim: int) -> None:
    """Put the new rows' keys and values where the tables say."""
    rows, segments, groups = code.field(task, ROWS, INTS), code.field(task, SEGMENTS, INTS), code.field(task, GROUPS)
    one, zero = code.number(1), code.number(0)
    sides = ((KEY, KEY_GROUP, KEY_ROW, 0, key_dim), (VALUE, VALUE_GROUP, VALUE_ROW, 1, value_dim))
    with code.counting(zero, code.field(task, WRITTEN), one) as row:
        entry = code.plus(rows, code.mul(row, code.number(4)))
        segment = code.plus(segments, code.mul(code.field(entry, 0), code.number(4)))
        position = code.field(entry, 1)
        for source, its_group, its_row, at, size in sides:
            given = code.plus(code.field(task, source, FLOATS), code.mul(row, code.field(task, its_row)))
            held = code.plus(code.field(segment, at, FLOATS), code.mul(position, code.number(size)))
            with code.counting(zero, groups, one) as group:
                read = code.plus(given, code.mul(group, code.field(task, its_group)))
                written = code.plus(held, code.mul(group, code.field(segment, at + 2)))
                for vector in range(-(-size // LANES)):
                    _store(code, written, vector, size, _load(code, read, vector, size))


def _parts(module: ir.Module, key_dim: int, value_dim: int) -> ir.Function:
    code = Code(module, "parts", NOTHING, [INTS, INT, INT])
    task, begin, end = code.args
    sums = -(-value_dim // LANES) * LANES
    keys = code.field(task, KEYS)
    size = code.mul(code.add(keys, code.number(sums + 1)), code.number(4 * TOGETHER))
    memory = code.call(declared(module, "malloc", BYTES, [INT]), [size])
    scores = code.bitcast(memory, FLOATS)
    totals = code.plus(scores, code.mul(keys, code.number(TOGETHER)))
    results = code.plus(totals, TOGETHER)
    heads, groups = code.field(task, HEADS), code.field(task, GROUPS)
    with code.counting(begin, end, code.number(1)) as part:
        unit = code.plus(code.field(task, UNITS, INTS), code.mul(code.sdiv(part, heads), code.number(2)))
        head = code.srem(part, heads)
        group = code.sdiv(code.mul(head, groups), heads)
        _Part(code, task, code.field(unit, 0), code.field(unit, 1), head, group, key_dim, value_dim).write(
            scores, totals, results
        )
    code.call(declared(module, "free", NOTHING, [BYTES]), [memory])
    code.ret_void()
    return code.made


class _Part:
    """Rows [first, last) of one session and one head of queries, which shares the keys and values of `group`."""

    def __init__(
        self, code: Code, task: Any, first: Any, last: Any, head: Any, group: Any, key_dim: int, value_dim: int
    ) -> None:
        self._code, self._task, self._first, self._last, self._head = code, task, first, last, head
        self._key_dim, self._value_dim, self._vectors = key_dim, value_dim, -(-value_dim // LANES)
        self._table = code.field(task, ROWS, INTS)
        segments, own = code.field(task, SEGMENTS, INTS), code.field(self._row(first), 0)
        segment = code.plus(segments, code.mul(own, code.number(4)))
        self._group_stride = code.field(segment, 2)
        self._keys = code.plus(code.field(segment, 0, FLOATS), code.mul(group, self._group_stride))
        self._values = code.plus(code.field(segment, 1, FLOATS), code.mul(group, code.field(segment, 3)))
        self._begin = self._chunk_of(code.field(self._row(first), 2))
        self._end = code.field(self._row(code.sub(last, code.number(1))), 3)
        self._stride = code.field(task, KEYS)
        with code.goto_entry_block():
            self._sink, self._largest, self._total = (code.alloca(kind) for kind in (FLOAT, _VECTOR, _VECTOR))

    def write(self, scores: Any, totals: Any, results: Any) -> None:
        """scores: (rows, keys); totals: (rows,); results: (rows, value_dim, rounded up to whole vectors)."""
        code = self._code
        count = code.number(self._vectors)
        with self._rows() as (row, at), code.counting(code.number(0), count, code.number(1)) as one:
            place = code.mul(code.add(code.mul(at, count), one), code.number(LANES))
            code.store(_spread(0.0), self._vector(results, place), align=4)
        keys, values = (self._keys, self._key_dim), (self._values, self._value_dim)
        others = code.plus(self._keys, self._group_stride), self._key_dim
        with self._chunks() as chunk:
            self._fetch(chunk, *keys, *values)
            with self._rows() as (row, at), self._seen(chunk, row):
                code.store(self._scores(chunk, row), self._score(scores, at, chunk), align=4)
        with self._rows() as (row, at):
            self._soften(scores, totals, row, at)
        with self._chunks() as chunk:
            self._fetch(chunk, *values, *others)
            with self._rows() as (row, at), self._seen(chunk, row):
                self._add_values(scores, results, chunk, at)
        with self._rows() as (row, at):
            self._hand_over(totals, results, row, at)

    def _fetch(self, chunk: Any, side: Any, size: int, following: Any, its_size: int) -> None:
        """Begin to read the chunk that is AHEAD of this one, in `following` behind the last one: by itself the
        processor reads on only within a page. What lies there may be nothing."""
        code = self._code
        length = code.sub(self._chunk_of(code.add(self._end, code.number(LANES - 1))), self._begin)
        ahead = code.add(chunk, code.smaller(length, code.number(AHEAD * LANES)))
        here = code.plus(side, code.mul(ahead, code.number(size)))
        there = code.plus(following, code.mul(code.sub(ahead, length), code.number(its_size)))
        begin = code.bitcast(code.select(code.icmp_signed("<", ahead, self._end), here, there), BYTES)
        fetch = declared(code.module, "llvm.prefetch.p0i8", NOTHING, [BYTES, WORD, WORD, WORD])
        for line in range(0, 4 * LANES * size, 64):
            code.call(fetch, [code.plus(begin, line), *(ir.Constant(WORD, one) for one in (0, 2, 1))])

    def _scores(self, chunk: Any, row: Any) -> Any:
        """Of a row with the keys chunk .. chunk + 15; -inf for those that it does not see."""
        code, task, size = self._code, self._task, self._key_dim
        query = code.plus(code.field(task, QUERY, FLOATS), code.mul(row, code.field(task, QUERY_ROW)))
        query = code.plus(query, code.mul(self._head, code.field(task, QUERY_HEAD)))
        keys = code.plus(self._keys, code.mul(chunk, code.number(size)))
        sums: list[Any] = [_spread(0.0)] * LANES
        for vector in range(-(-size // LANES)):
            part = _load(code, query, vector, size)
            for key in range(LANES):
                its = _load(code, code.plus(keys, key * size), vector, size)
                sums[key] = _fused(code, part, its, sums[key])
        apart = LANES // 2
        while apart:  # fold every sum, two keys' halves, quarters, ... in one vector
            low = [lane if not lane & apart else LANES + lane - apart for lane in range(LANES)]
            high = [lane + apart if not lane & apart else LANES + lane for lane in range(LANES)]
            pairs = [(sums[at], sums[at + apart]) for at in range(apart)]
            sums = [code.fadd(_picked(code, *pair, low), _picked(code, *pair, high)) for pair in pairs]
            apart //= 2
        scale = code.bitcast(code.trunc(code.field(task, SCALE), WORD), FLOAT)
        found = code.fmul(sums[0], code.spread(scale, LANES))
        entry = self._row(row)
        places = code.add(_spread_word(code, chunk), ir.Constant(_WORDS, list(range(LANES))))
        after = code.icmp_signed(">=", places, _spread_word(code, code.field(entry, 2)))
        before = code.icmp_signed("<", places, _spread_word(code, code.field(entry, 3)))
        return code.select(code.and_(after, before), found, _spread(float("-inf")))

    def _soften(self, scores: Any, totals: Any, row: Any, at: Any) -> None:
        """Scores become exp(score - largest), and their sum."""
        code, entry = self._code, self._row(row)
        sinks = code.field(self._task, SINKS)
        has_sinks = code.icmp_signed("!=", sinks, code.number(0))
        sink, largest, total = self._sink, self._largest, self._total
        code.store(ir.Constant(FLOAT, float("-inf")), sink)
        with code.if_then(has_sinks):
            code.store(code.load(code.plus(code.inttoptr(sinks, FLOATS), self._head)), sink)
        code.store(code.spread(code.load(sink), LANES), largest)
        code.store(_spread(0.0), total)
        begin, end = self._chunk_of(code.field(entry, 2)), code.field(entry, 3)
        with code.counting(begin, end, code.number(LANES)) as chunk:
            score, before = code.load(self._score(scores, at, chunk), align=4), code.load(largest)
            code.store(code.select(code.fcmp_ordered(">", score, before), score, before), largest)
        top = code.load(largest)
        for apart in (8, 4, 2, 1):
            other = _picked(code, top, top, [lane ^ apart for lane in range(LANES)])
            top = code.select(code.fcmp_ordered(">", other, top), other, top)
        with code.counting(begin, end, code.number(LANES)) as chunk:
            place = self._score(scores, at, chunk)
            share = exponential(code, code.fsub(code.load(place, align=4), top))
            code.store(share, place, align=4)
            code.store(code.fadd(code.load(total), share), total)
        whole = code.load(total)
        for apart in (8, 4, 2, 1):
            whole = code.fadd(whole, _picked(code, whole, whole, [lane ^ apart for lane in range(LANES)]))
        shared = exponential(code, code.fsub(code.spread(code.load(sink), LANES), top))
        whole = code.select(has_sinks, code.fadd(whole, shared), whole)
        code.store(code.extract_element(whole, ir.Constant(WORD, 0)), code.plus(totals, at))

    def _add_values(self, scores: Any, results: Any, chunk: Any, at: Any) -> None:
        """Add a chunk's values times their shares, added up from zero in their order, to a row's result."""
        code, size = self._code, self._value_dim
        shares = code.plus(scores, code.mul(at, self._stride), code.sub(chunk, self._begin))
        values = code.plus(self._values, code.mul(chunk, code.number(size)))
        sums: list[Any] = [_spread(0.0)] * self._vectors
        for key in range(LANES):
            share = code.spread(code.load(code.plus(shares, key)), LANES)
            line = code.plus(values, key * size)
            sums = [_fused(code, share, _load(code, line, at_, size), one) for at_, one in enumerate(sums)]
        begin = code.mul(at, code.number(self._vectors * LANES))
        for vector, found in enumerate(sums):
            place = self._vector(results, code.add(begin, code.number(vector * LANES)))
            code.store(code.fadd(code.load(place, align=4), found), place, align=4)

    def _hand_over(self, totals: Any, results: Any, row: Any, at: Any) -> None:
        code, task, size = self._code, self._task, self._value_dim
        total = code.spread(code.load(code.plus(totals, at)), LANES)
        head = code.add(code.mul(row, code.field(task, HEADS)), self._head)
        out = code.plus(code.field(task, OUT, FLOATS), code.mul(head, code.number(size)))
        begin = code.mul(at, code.number(self._vectors * LANES))
        for vector in range(self._vectors):
            place = self._vector(results, code.add(begin, code.number(vector * LANES)))
            _store(code, out, vector, size, code.fdiv(code.load(place, align=4), total))

    # -- where things are

    def _row(self, row: Any) -> Any:
        return self._code.plus(self._table, self._code.mul(row, self._code.number(4)))

    def _chunk_of(self, key: Any) -> Any:
        return self._code.and_(key, self._code.number(-LANES))

    def _vector(self, floats: Any, place: Any) -> Any:
        return self._code.bitcast(self._code.plus(floats, place), ir.PointerType(_VECTOR))

    def _score(self, scores: Any, at: Any, chunk: Any) -> Any:
        code = self._code
        return self._vector(scores, code.add(code.mul(at, self._stride), code.sub(chunk, self._begin)))

    def _chunks(self) -> Any:
        return self._code.counting(self._begin, self._end, self._code.number(LANES))

    def _rows(self) -> Any:
        return _Rows(self._code, self._first, self._last)

    def _seen(self, chunk: Any, row: Any) -> Any:
        """Only if the row sees any of the chunk's keys."""
        code, entry = self._code, self._row(row)
        begins = code.icmp_signed("<", chunk, code.field(entry, 3))
        ends = code.icmp_signed(">", code.add(chunk, code.number(LANES)), code.field(entry, 2))
        return code.if_then(code.and_(begins, ends))


class _Rows:
    """A loop over rows: each, and its place among them."""

    def __init__(self, code: Code, first: Any, last: Any) -> None:
        self._code, self._first = code, first
        self._loop = code.counting(first, last, code.number(1))

    def __enter__(self) -> tuple[Any, Any]:
        row = self._loop.__enter__()
        return row, self._code.sub(row, self._first)

    def __exit__(self, *error: Any) -> None:
        self._loop.__exit__(*error)


def exponential(code: Code, x: Any) -> Any:
    """exp(x) for x <= 0: 2^n exp(r) with |r| <= ln(2) / 2, exp(r) by its Taylor series to the seventh power (what is
    left out is below 6e-9 of it); zero below -87."""
    rounder, log2e = 12582912.0, 1.4426950408889634  # 1.5 x 2^23: adding it rounds to an integer
    high, low = 0.693145751953125, 1.4286068203094172e-06  # ln(2) in two parts
    n = code.fsub(code.fadd(code.fmul(x, _spread(log2e)), _spread(rounder)), _spread(rounder))
    r = _fused(code, n, _spread(-low), _fused(code, n, _spread(-high), x))
    result, factor = _spread(1 / 5040), 5040.0
    for power in range(7, 0, -1):
        factor /= power
        result = _fused(code, result, r, _spread(1 / factor))
    exponent = code.shl(code.add(code.fptosi(n, _WORDS), _spread_int(127)), _spread_int(23))
    found = code.fmul(result, code.bitcast(exponent, _VECTOR))
    return code.select(code.fcmp_ordered("<", x, _spread(-87.0)), _spread(0.0), found)


def _fused(code: Code, one: Any, other: Any, added: Any) -> Any:
    function = declared(code.module, f"llvm.fma.v{LANES}f32", _VECTOR, [_VECTOR] * 3)
    return code.call(function, [one, other, added])


def _picked(code: Code, one: Any, other: Any, lanes: list[int]) -> Any:
    return code.shuffle_vector(one, other, ir.Constant(_WORDS, lanes))


def _spread(value: float) -> Any:
    return ir.Constant(_VECTOR, [value] * LANES)


def _spread_int(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def _spread_word(code: Code, value: Any) -> Any:
    return code.spread(code.trunc(value, WORD), LANES)


def _load(code: Code, floats: Any, vector: int, size: int) -> Any:
    """Values 16 vector .. of a line of so many; zeros behind its end, where nothing is read."""
    start = code.plus(floats, vector * LANES)
    count = min(LANES, size - vector * LANES)
    if count == LANES:
        return code.load(code.bitcast(start, ir.PointerType(_VECTOR)), align=4)
    found: Any = _spread(0.0)
    for lane in range(count):
        found = code.insert_element(found, code.load(code.plus(start, lane)), ir.Constant(WORD, lane))
    return found


def _store(code: Code, floats: Any, vector: int, size: int, value: Any) -> None:
    start = code.plus(floats, vector * LANES)
    count = min(LANES, size - vector * LANES)
    if count == LANES:
        code.store(value, code.bitcast(start, ir.PointerType(_VECTOR)), align=4)
        return
    for lane in range(count):
        code.store(code.extract_element(value, ir.Constant(WORD, lane)), code.plus(start, lane))
