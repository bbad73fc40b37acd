"""The code of `tape.py`, as LLVM's intermediate language. One function for everybody, and one for each kind of step:

    run(records*, bases*, count)       the records, one after the other
    step(record*, bases*)              one of them

What a record's fields are is `tape.py`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from llvmlite import ir

from tallystick_model.canonical.native.code import (
    BYTES,
    FLOAT,
    FLOATS,
    INT,
    INTS,
    NOTHING,
    WORD,
    Code,
    declared,
)
from tallystick_model.canonical.native.tape import (
    BINARY,
    DIMS,
    FIELDS,
    FIRST_SIZE,
    FIRST_STRIDE,
    ONCE_MORE,
    OPERANDS,
    UNARY,
    Kind,
    kind_of,
)

LANES = 16
"""Of a vector, on every processor: what an element becomes does not depend on it."""

SUMMED = 8
"""Partial sums of a row's vectors: ATen's, on every processor."""

_VECTOR, _WORDS, _EIGHT = ir.VectorType(FLOAT, LANES), ir.VectorType(WORD, LANES), ir.VectorType(FLOAT, SUMMED)


def tape_module(width: int) -> ir.Module:
    """width: float32 in the vectors that an exponential function takes."""
    module = ir.Module("tape")
    steps: dict[int, ir.Function] = {}
    for name in UNARY:
        steps[kind_of(name)] = _elementwise(module, name, (False,))
    for name in BINARY:
        for spread in ((False, False), (True, False), (False, True)):
            steps[kind_of(name, spread)] = _elementwise(module, name, spread)
    steps[Kind.MEAN] = _mean(module)
    steps[Kind.SILU] = _silu(module, width)
    steps[Kind.PRODUCT] = _product(module)
    steps[Kind.ATTEND] = _attend(module)
    code = Code(module, "run", NOTHING, [INTS, INTS, INT], public=True)
    records, bases, count = code.args
    with code.counting(code.number(0), count, code.number(1)) as at:
        record = code.plus(records, code.mul(at, code.number(FIELDS)))
        done = code.append_basic_block("done")
        choice = code.switch(code.field(record, 0), done)
        for kind, step in steps.items():
            choice.add_case(code.number(kind), block := code.append_basic_block(f"kind{kind}"))
            code.position_at_end(block)
            code.call(step, [record, bases])
            code.branch(done)
        code.position_at_end(done)
    code.ret_void()
    return module


def _place(code: Code, record: Any, bases: Any, operand: int) -> Any:
    """The address of an operand: 0 is the result."""
    base, offset = (code.field(record, 1 + 2 * operand + at) for at in range(2))
    return code.inttoptr(code.add(code.load(code.plus(bases, base)), offset), BYTES)


def _begun(module: ir.Module, name: str) -> tuple[Code, Any, Any]:
    code = Code(module, f"step_{name}", NOTHING, [INTS, INTS])
    record, bases = code.args
    return code, record, bases


# -- every element by itself


def _elementwise(module: ir.Module, name: str, spread: tuple[bool, ...]) -> ir.Function:
    """spread: of each operand, whether one element serves for all that lie side by side."""
    code, record, bases = _begun(module, name + "".join("_one" if one else "_all" for one in spread))
    starts = [_place(code, record, bases, operand) for operand in range(1 + len(spread))]
    with _outer(code, record, starts) as places:
        out, *given = (code.bitcast(place, FLOATS) for place in places)
        count = code.field(record, FIRST_SIZE + DIMS - 1)
        fixed = [code.load(place) if one else None for place, one in zip(given, spread, strict=True)]
        whole = code.and_(count, code.number(-LANES))
        with code.counting(code.number(0), whole, code.number(LANES)) as at:
            taken = [
                code.spread(one, LANES) if one is not None else code.load(_vector(code, code.plus(place, at)), align=4)
                for place, one in zip(given, fixed, strict=True)
            ]
            code.store(_computed(code, name, taken, _VECTOR), _vector(code, code.plus(out, at)), align=4)
        with code.counting(whole, count, code.number(1)) as at:
            taken = [
                one if one is not None else code.load(code.plus(place, at), align=4)
                for place, one in zip(given, fixed, strict=True)
            ]
            code.store(_computed(code, name, taken, FLOAT), code.plus(out, at), align=4)
    code.ret_void()
    return code.made


@contextmanager
def _outer(code: Code, record: Any, places: list[Any]) -> Iterator[list[Any]]:
    """Loops over all dimensions but the last; where each operand's last one begins."""
    with ExitStack() as loops:
        for dim in range(DIMS - 1):
            size = code.field(record, FIRST_SIZE + dim)
            at = loops.enter_context(code.counting(code.number(0), size, code.number(1)))
            strides = [FIRST_STRIDE + operand * (DIMS - 1) + dim for operand in range(len(places))]
            places = [
                code.plus(place, code.mul(at, code.field(record, stride)))
                for place, stride in zip(places, strides, strict=True)
            ]
        yield places


def _computed(code: Code, name: str, taken: list[Any], kind: Any) -> Any:
    one, *others = taken
    if name == "copy":
        return one
    if name == "neg":
        return code.fneg(one)
    if name == "square":
        return code.fmul(one, one)
    if name == "rsqrt":
        lanes = kind.count if isinstance(kind, ir.VectorType) else 0
        root = declared(code.module, f"llvm.sqrt.{f'v{lanes}' if lanes else ''}f32", kind, [kind])
        ones = ir.Constant(kind, [1.0] * lanes) if lanes else ir.Constant(kind, 1.0)
        return code.fdiv(ones, code.call(root, [one]))
    if name == "round":
        return _rounded(code, one, kind)
    operator = {"add": code.fadd, "sub": code.fsub, "mul": code.fmul, "div": code.fdiv}[name]
    return operator(one, others[0])


def _rounded(code: Code, value: Any, kind: Any) -> Any:
    """To bfloat16, to nearest, ties to even, and back; a NaN stays one."""
    lanes = kind.count if isinstance(kind, ir.VectorType) else 0
    words = _WORDS if lanes else WORD

    def constant(number: int) -> Any:
        return ir.Constant(words, [number] * lanes if lanes else number)

    bits = code.bitcast(value, words)
    odd = code.and_(code.lshr(bits, constant(16)), constant(1))
    near = code.and_(code.add(bits, code.add(odd, constant(0x7FFF))), constant(0xFFFF0000))
    is_number = code.fcmp_ordered("ord", value, value)
    return code.bitcast(code.select(is_number, near, constant(0x7FC00000)), kind)


# -- rows


def _mean(module: ir.Module) -> ir.Function:
    """Of rows that lie side by side, in ATen's order: four sums of vectors take turns; every sixteen turns they are
    added to what was summed before; then the four, what is left, and the lanes of the vector."""
    code, record, bases = _begun(module, "mean")
    out = code.bitcast(_place(code, record, bases, 0), FLOATS)
    given = code.bitcast(_place(code, record, bases, 1), FLOATS)
    rows, size = (code.field(record, FIRST_SIZE + at) for at in range(2))
    turn = 4 * SUMMED
    recent, before = ([code.alloca(_EIGHT) for _ in range(4)] for _ in range(2))
    rest = code.alloca(FLOAT)
    zero, eight = ir.Constant(_EIGHT, [0.0] * SUMMED), ir.PointerType(_EIGHT)
    vectors = code.number(-SUMMED)
    in_turns, in_vectors = code.mul(code.udiv(size, code.number(turn)), code.number(turn)), code.and_(size, vectors)
    long = code.mul(code.udiv(size, code.number(16 * turn)), code.number(16 * turn))

    def add_turn(row: Any, at: Any) -> None:
        for number, total in enumerate(recent):
            vector = code.load(code.bitcast(code.plus(row, at, number * SUMMED), eight), align=4)
            code.store(code.fadd(code.load(total), vector), total)

    with code.counting(code.number(0), rows, code.number(1)) as row_number:
        row = code.plus(given, code.mul(row_number, size))
        for total in (*recent, *before):
            code.store(zero, total)
        with code.counting(code.number(0), long, code.number(16 * turn)) as begin:
            with code.counting(begin, code.add(begin, code.number(16 * turn)), code.number(turn)) as at:
                add_turn(row, at)
            for held, total in zip(before, recent, strict=True):
                code.store(code.fadd(code.load(held), code.load(total)), held)
                code.store(zero, total)
        with code.counting(long, in_turns, code.number(turn)) as at:
            add_turn(row, at)
        for held, total in zip(before, recent, strict=True):
            code.store(code.fadd(code.load(total), code.load(held)), total)
        with code.counting(in_turns, in_vectors, code.number(SUMMED)) as at:
            vector = code.load(code.bitcast(code.plus(row, at), eight), align=4)
            code.store(code.fadd(code.load(recent[0]), vector), recent[0])
        total = code.load(recent[0])
        for other in recent[1:]:
            total = code.fadd(total, code.load(other))
        code.store(ir.Constant(FLOAT, 0.0), rest)
        with code.counting(in_vectors, size, code.number(1)) as at:
            code.store(code.fadd(code.load(rest), code.load(code.plus(row, at), align=4)), rest)
        whole = code.load(rest)
        for lane in range(SUMMED):
            whole = code.fadd(whole, code.extract_element(total, ir.Constant(WORD, lane)))
        code.store(code.fdiv(whole, code.sitofp(size, FLOAT)), code.plus(out, row_number), align=4)
    code.ret_void()
    return code.made


def _silu(module: ir.Module, width: int) -> ir.Function:
    """x / (1 + exp(-x)) with the exponential function that ATen uses, of whole vectors."""
    code, record, bases = _begun(module, "silu")
    kind = ir.VectorType(FLOAT, width)
    out = code.bitcast(_place(code, record, bases, 0), FLOATS)
    given = code.bitcast(_place(code, record, bases, 1), FLOATS)
    count = code.field(record, FIRST_SIZE)
    function = code.inttoptr(code.field(record, ONCE_MORE), ir.PointerType(ir.FunctionType(kind, [kind])))
    with code.counting(code.number(0), count, code.number(width)) as at:
        value = code.load(code.bitcast(code.plus(given, at), ir.PointerType(kind)), align=4)
        raised = code.call(function, [code.fneg(value)])
        made = code.fdiv(value, code.fadd(ir.Constant(kind, [1.0] * width), raised))
        code.store(made, code.bitcast(code.plus(out, at), ir.PointerType(kind)), align=4)
    code.ret_void()
    return code.made


# -- what has code of its own


def _product(module: ir.Module) -> ir.Function:
    """By `product(weight*, x*, y*, rows)`."""
    code, record, bases = _begun(module, "product")
    y, x = (_place(code, record, bases, operand) for operand in range(2))
    weight, rows = (code.field(record, FIRST_SIZE + at) for at in range(2))
    kind = ir.PointerType(ir.FunctionType(NOTHING, [BYTES, BYTES, BYTES, INT]))
    code.call(code.inttoptr(code.field(record, ONCE_MORE), kind), [code.inttoptr(weight, BYTES), x, y, rows])
    code.ret_void()
    return code.made


def _attend(module: ir.Module) -> ir.Function:
    """By `attend(task*)`: the addresses of what it takes and makes are written into its task."""
    code, record, bases = _begun(module, "attend")
    task = code.field(record, FIRST_SIZE, INTS)
    for operand in range(OPERANDS):
        address = code.ptrtoint(_place(code, record, bases, operand), INT)
        field = code.field(record, FIRST_SIZE + 1 + operand)
        code.store(address, code.plus(task, field))
    kind = ir.PointerType(ir.FunctionType(NOTHING, [INTS]))
    code.call(code.inttoptr(code.field(record, ONCE_MORE), kind), [task])
    code.ret_void()
    return code.made


def _vector(code: Code, floats: Any) -> Any:
    return code.bitcast(floats, ir.PointerType(_VECTOR))
