"""The code of `native.py`, as LLVM's intermediate language. Four functions:

    pack(from*, to*, columns, words)                    a weight (columns, words of 32 bits) into panels
    product(weight*, x*, y*, rows)                      all panels, by one thread or by several
    panels({weight*, x*, y*, rows}*, begin, end)        panels [begin, end)
    tile(x*, w*, stride, bias*, y*, width, inputs)      some rows through one panel or two, for each number of rows

A weight is described by five 64-bit numbers: where its panels are, where its bias is (padded to whole panels; 0 for
none), inputs, columns, panels. x is (rows, inputs), y (rows, columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from tallystick_model.canonical.native.code import (
    FLOAT,
    FLOATS,
    INT,
    INTS,
    NOTHING,
    WORD,
    WORDS,
    Code,
    Shared,
    declared,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """panel: columns; block: inputs; lanes: float32 of a vector; halves: two bf16 weights in each 32 bits."""

    panel: int
    block: int
    lanes: int
    halves: bool

    @property
    def vectors(self) -> int:
        """Of a panel."""
        return self.panel // self.lanes

    @property
    def tallest(self) -> int:
        """Rows of the largest tile: with 16 lanes, sums and weights fill the 32 registers."""
        return 5 if self.halves and self.lanes == 16 else 6

    def vectors_at_once(self, rows: int) -> int:
        """Of a panel that has so many rows' sums in registers: 32 with 16 lanes, 16 with 8."""
        if self.lanes == 16 or rows == 1:
            return self.vectors
        return 4 if rows <= 3 else 2

    @property
    def pairs_up_to(self) -> int:
        """Rows that go through two panels at once: few sums alone would wait for each other."""
        return 2 if self.lanes == 16 else 0


def product_module(layout: Layout, shared_work: int | None) -> ir.Module:
    """shared_work: as `Shared` has it."""
    module = ir.Module("products")
    _pack(module, layout)
    shared = Shared(module, _panels(module, layout), "product", shared_work)
    code = Code(module, "product", NOTHING, [INTS, FLOATS, FLOATS, INT], public=True)
    weight, x, y, rows = code.args
    task = code.alloca(INT, 4)
    for at, value in enumerate((weight, x, y)):
        code.store(code.ptrtoint(value, INT), code.plus(task, at))
    code.store(rows, code.plus(task, 3))
    work = code.mul(code.mul(rows, code.field(weight, 2)), code.field(weight, 3))
    few = code.icmp_signed("<=", rows, code.number(layout.pairs_up_to))
    takes = code.select(few, code.number(2), code.number(1))
    shared.compute(code, task, code.field(weight, 4), takes, work)
    return module


def _pack(module: ir.Module, layout: Layout) -> None:
    """Square blocks of as many columns and words as a vector holds are turned in registers, what is left one by one."""
    code = Code(module, "pack", NOTHING, [WORDS, WORDS, INT, INT], public=True)
    source, target, columns, words = code.args
    zero, one, size = code.number(0), code.number(1), code.number(layout.lanes)
    squares = code.sub(words, code.urem(words, size))
    with code.counting(zero, columns, size) as begin:
        end = code.smaller(code.add(begin, size), columns)
        inside = code.urem(begin, code.number(layout.panel))
        to = code.plus(target, code.mul(code.sub(begin, inside), words), inside)
        is_whole = code.icmp_signed("<=", code.add(begin, size), columns)
        turned = code.select(is_whole, squares, zero)
        with code.counting(zero, turned, size) as word:
            _turn(code, layout, code.plus(source, code.mul(begin, words), word), words, to, word)
        with code.counting(begin, end, one) as column:
            read, written = code.plus(source, code.mul(column, words)), code.plus(to, code.sub(column, begin))
            with code.counting(turned, words, one) as word:
                place = code.mul(word, code.number(layout.panel))
                code.store(code.load(code.plus(read, word)), code.plus(written, place))
    code.ret_void()


def _turn(code: Code, layout: Layout, source: Any, words: Any, to: Any, word: Any) -> None:
    """A square block: its columns' words, which lie `words` apart, become lines of the panel."""
    kind, lanes = ir.VectorType(WORD, layout.lanes), range(layout.lanes)
    pointer, lines = ir.PointerType(kind), []
    for _ in lanes:
        lines.append(code.load(code.bitcast(source, pointer), align=4))
        source = code.plus(source, words)
    for apart in (1 << bit for bit in range(layout.lanes.bit_length() - 1)):
        low = [lane if not lane & apart else layout.lanes + lane - apart for lane in lanes]
        high = [lane + apart if not lane & apart else layout.lanes + lane for lane in lanes]
        for at in (at for at in lanes if not at & apart):
            pair = lines[at], lines[at + apart]
            lines[at], lines[at + apart] = (
                code.shuffle_vector(*pair, ir.Constant(kind, mask)) for mask in (low, high)
            )
    for at, line in enumerate(lines):
        place = code.mul(code.add(word, code.number(at)), code.number(layout.panel))
        code.store(line, code.bitcast(code.plus(to, place), pointer), align=4)


def _tile(module: ir.Module, layout: Layout, rows: int, panels: int) -> ir.Function:
    """rows x panels: y = x w + bias. stride: 32-bit weights from one panel to the next; width: of y's rows."""
    types = [FLOATS, WORDS, INT, FLOATS, FLOATS, INT, INT]
    code = Code(module, f"tile_{rows}x{panels}", NOTHING, types)
    x, w, stride, bias, y, width, inputs = code.args
    xs, ys = [x], [y]
    for _ in range(1, rows):
        xs.append(code.plus(xs[-1], inputs))
        ys.append(code.plus(ys[-1], width))
    ws = [code.plus(w, code.mul(stride, code.number(panel))) for panel in range(panels)]
    at_once = layout.vectors_at_once(rows)
    last = code.sub(inputs, code.number(1))
    with code.counting(code.number(0), inputs, code.number(layout.block)) as block:
        end = code.smaller(code.add(block, code.number(layout.block)), inputs)
        is_first = code.icmp_signed("==", block, code.number(0))
        is_last = code.icmp_signed(">", end, last)
        with code.counting(code.number(0), code.number(layout.panel), code.number(at_once * layout.lanes)) as column:
            sums = _block(code, layout, xs, [code.plus(one, column) for one in ws], block, end, at_once)
            for at, row in enumerate(ys):
                for panel in range(panels):
                    for vector in range(at_once):
                        offset = panel * layout.panel + vector * layout.lanes
                        found = sums[(at * panels + panel) * at_once + vector]
                        where = code.plus(row, column, offset)
                        _add_up(code, layout, where, found, is_first, is_last, bias, code.plus(bias, column, offset))
    code.ret_void()
    return code.made


def _block(code: Code, layout: Layout, xs: list[Any], ws: list[Any], begin: Any, end: Any, at_once: int) -> list[Any]:
    """The sums over inputs [begin, end) of each row, panel and vector, from zero."""
    vector = ir.VectorType(FLOAT, layout.lanes)
    fused = declared(code.module, f"llvm.fma.v{layout.lanes}f32", vector, [vector] * 3)
    body, done, before = code.append_basic_block("inputs"), code.append_basic_block("summed"), code.block
    code.branch(body)
    code.position_at_end(body)
    at = code.phi(INT)
    at.add_incoming(begin, before)
    sums = [code.phi(vector) for _ in range(len(xs) * len(ws) * at_once)]
    for one in sums:
        one.add_incoming(ir.Constant(vector, [0.0] * layout.lanes), before)
    inputs = 2 if layout.halves else 1
    line = code.mul(code.udiv(at, code.number(inputs)), code.number(layout.panel))
    found: list[Any] = list(sums)
    weights = [
        _weights(code, layout, code.plus(w, line, number * layout.lanes)) for w in ws for number in range(at_once)
    ]
    for step in range(inputs):
        for row, x in enumerate(xs):
            value = code.spread(code.load(code.plus(x, at, step)), layout.lanes)
            for number, weight in enumerate(weights):
                slot = row * len(weights) + number
                found[slot] = code.call(fused, [value, weight[step], found[slot]])
    following = code.add(at, code.number(inputs))
    at.add_incoming(following, body)
    for one, new in zip(sums, found, strict=True):
        one.add_incoming(new, body)
    code.cbranch(code.icmp_signed("<", following, end), body, done)
    code.position_at_end(done)
    return found


def _weights(code: Code, layout: Layout, where: Any) -> list[Any]:
    """One vector of weights, or the two inputs' that share 32 bits: the earlier one has the low half."""
    floats, words = ir.VectorType(FLOAT, layout.lanes), ir.VectorType(WORD, layout.lanes)
    read = code.load(code.bitcast(where, ir.PointerType(words)), align=4)
    if not layout.halves:
        return [code.bitcast(read, floats)]
    low = code.shl(read, ir.Constant(words, [16] * layout.lanes))
    high = code.and_(read, ir.Constant(words, [0xFFFF0000] * layout.lanes))
    return [code.bitcast(low, floats), code.bitcast(high, floats)]


def _add_up(
    code: Code, layout: Layout, where: Any, found: Any, is_first: Any, is_last: Any, bias: Any, its: Any
) -> None:
    """Put a block's sums where they belong: added to those before, and with the bias added to the last."""
    pointer = ir.PointerType(ir.VectorType(FLOAT, layout.lanes))
    where = code.bitcast(where, pointer)
    before = code.block
    with code.if_then(code.not_(is_first)):
        added, inside = code.fadd(code.load(where, align=4), found), code.block
    total = code.phi(found.type)
    total.add_incoming(found, before)
    total.add_incoming(added, inside)
    before = code.block
    has_bias = code.icmp_unsigned("!=", code.ptrtoint(bias, INT), code.number(0))
    with code.if_then(code.and_(is_last, has_bias)):
        shifted, inside = code.fadd(total, code.load(code.bitcast(its, pointer), align=4)), code.block
    result = code.phi(found.type)
    result.add_incoming(total, before)
    result.add_incoming(shifted, inside)
    code.store(result, where, align=4)


def _panels(module: ir.Module, layout: Layout) -> ir.Function:
    singles = {rows: _tile(module, layout, rows, 1) for rows in range(1, layout.tallest + 1)}
    pairs = {rows: _tile(module, layout, rows, 2) for rows in range(1, layout.pairs_up_to + 1)}
    code = Code(module, "panels", NOTHING, [INTS, INT, INT])
    task, begin, end = code.args
    weight, x, y, rows = (code.field(task, at, kind) for at, kind in enumerate((INTS, FLOATS, FLOATS, None)))
    w, bias = code.field(weight, 0, WORDS), code.field(weight, 1, FLOATS)
    inputs, columns = code.field(weight, 2), code.field(weight, 3)
    has_bias = code.icmp_unsigned("!=", code.ptrtoint(bias, INT), code.number(0))
    scratch = code.alloca(FLOAT, layout.tallest * layout.panel)
    stride = code.mul(inputs, code.number(layout.panel // 2 if layout.halves else layout.panel))
    at = code.alloca(INT)
    code.store(begin, at)
    head, body, done = (code.append_basic_block(name) for name in ("head", "body", "done"))
    code.branch(head)
    code.position_at_end(head)
    panel = code.load(at)
    code.cbranch(code.icmp_signed("<", panel, end), body, done)
    code.position_at_end(body)
    column = code.mul(panel, code.number(layout.panel))
    its_bias = code.select(has_bias, code.plus(bias, column), bias)
    its_w, its_y = code.plus(w, code.mul(panel, stride)), code.plus(y, column)
    width = code.sub(columns, column)
    if pairs:
        several = code.and_(
            code.icmp_signed("<", code.add(panel, code.number(1)), end),
            code.and_(
                code.icmp_signed("<=", rows, code.number(layout.pairs_up_to)),
                code.icmp_signed(">=", width, code.number(2 * layout.panel)),
            ),
        )
        with code.if_then(several):
            _by_number(code, pairs, rows, [x, its_w, stride, its_bias, its_y, columns, inputs])
            code.store(code.add(panel, code.number(2)), at)
            code.branch(head)
            code.position_at_end(code.append_basic_block("unreached"))
    with code.counting(code.number(0), rows, code.number(layout.tallest)) as row:
        count = code.smaller(code.sub(rows, row), code.number(layout.tallest))
        its_x, goes_to = code.plus(x, code.mul(row, inputs)), code.plus(its_y, code.mul(row, columns))
        with code.if_else(code.icmp_signed(">=", width, code.number(layout.panel))) as (whole, cut):
            with whole:
                _by_number(code, singles, count, [its_x, its_w, stride, its_bias, goes_to, columns, inputs])
            with cut:
                size = code.number(layout.panel)
                _by_number(code, singles, count, [its_x, its_w, stride, its_bias, scratch, size, inputs])
                with code.counting(code.number(0), count, code.number(1)) as one:
                    read, written = code.plus(scratch, code.mul(one, size)), code.plus(goes_to, code.mul(one, columns))
                    with code.counting(code.number(0), width, code.number(1)) as place:
                        code.store(code.load(code.plus(read, place)), code.plus(written, place))
    code.store(code.add(panel, code.number(1)), at)
    code.branch(head)
    code.position_at_end(done)
    code.ret_void()
    return code.made


def _by_number(code: Code, tiles: dict[int, ir.Function], count: Any, arguments: list[Any]) -> None:
    """Call the tile of so many rows."""
    done = code.append_basic_block("tiled")
    choice = code.switch(count, done)
    for rows, tile in tiles.items():
        choice.add_case(code.number(rows), block := code.append_basic_block(f"rows{rows}"))
        code.position_at_end(block)
        code.call(tile, arguments)
        code.branch(done)
    code.position_at_end(done)
