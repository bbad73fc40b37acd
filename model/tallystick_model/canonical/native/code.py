"""Writing functions in LLVM's intermediate language: loops, tables of 64-bit numbers, jobs that threads share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

FLOAT, INT, WORD, BYTE, NOTHING = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.VoidType()
FLOATS, INTS, BYTES, WORDS = (ir.PointerType(kind) for kind in (FLOAT, INT, BYTE, WORD))


class Code(ir.IRBuilder):
    """A function that is being written. Arguments are in `args`."""

    def __init__(self, module: ir.Module, name: str, result: Any, types: list[Any], public: bool = False) -> None:
        self.made = ir.Function(module, ir.FunctionType(result, types), name)
        self.made.linkage = "external" if public else "internal"
        self.args = self.made.args
        super().__init__(self.made.append_basic_block("entry"))

    def number(self, value: int) -> ir.Constant:
        return ir.Constant(INT, value)

    def plus(self, pointer: Any, *offsets: Any) -> Any:
        for offset in offsets:
            pointer = self.gep(pointer, [self.number(offset) if isinstance(offset, int) else offset])
        return pointer

    def field(self, pointer: Any, at: int, kind: Any = None) -> Any:
        value = self.load(self.plus(pointer, at))
        return value if kind is None else self.inttoptr(value, kind)

    def spread(self, value: Any, lanes: int) -> Any:
        """A vector in which it stands so many times."""
        undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        one = self.insert_element(undefined, value, ir.Constant(WORD, 0))
        return self.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(WORD, lanes), [0] * lanes))

    def smaller(self, one: Any, other: Any) -> Any:
        return self.select(self.icmp_signed("<", one, other), one, other)

    @contextmanager
    def counting(self, begin: Any, end: Any, step: Any) -> Iterator[Any]:
        """A loop over begin, begin + step, ... below end."""
        head, body, done = (self.append_basic_block(name) for name in ("head", "body", "done"))
        before = self.block
        self.branch(head)
        self.position_at_end(head)
        at = self.phi(INT)
        at.add_incoming(begin, before)
        self.cbranch(self.icmp_signed("<", at, end), body, done)
        self.position_at_end(body)
        yield at
        at.add_incoming(self.add(at, step), self.block)
        self.branch(head)
        self.position_at_end(done)


def arithmetic(code: Code) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Read and set how this thread rounds and treats denormals: x86's MXCSR."""
    kept = code.alloca(WORD)
    names = ("stmxcsr", "ldmxcsr")
    found = {name: declared(code.module, f"llvm.x86.sse.{name}", NOTHING, [BYTES]) for name in names}

    def read() -> Any:
        code.call(found["stmxcsr"], [code.bitcast(kept, BYTES)])
        return code.zext(code.load(kept), INT)

    def write(value: Any) -> None:
        code.store(code.trunc(value, WORD), kept)
        code.call(found["ldmxcsr"], [code.bitcast(kept, BYTES)])

    return read, write


_NEXT, _TAKES, _COUNT, _ARITHMETIC, _TASK = range(5)
"""Fields of a job that threads share. next: the part that nobody has taken yet; takes: how many are taken at once;
count: of parts; arithmetic: what the calling thread does with denormals; task: what `run` is told."""


class Shared:
    """run(task*, begin, end), which computes parts [begin, end) of a task, by one thread or by all that torch uses.

    Each takes the next parts when it has computed its last ones, so that nobody waits for one that comes late.
    """

    def __init__(self, module: ir.Module, run: ir.Function, name: str, shared_work: int | None) -> None:
        """shared_work: multiplications from which threads share a task; None where one computes all."""
        self._run, self._worker, self._shared_work = run, None, shared_work
        if shared_work is None:
            return
        code = Code(module, f"{name}_worker", NOTHING, [BYTES])
        job = code.bitcast(code.args[0], INTS)
        read, write = arithmetic(code)
        own = read()
        write(code.field(job, _ARITHMETIC))
        takes, count, task = code.field(job, _TAKES), code.field(job, _COUNT), code.field(job, _TASK, INTS)
        head, body, done = (code.append_basic_block(block) for block in ("head", "body", "done"))
        code.branch(head)
        code.position_at_end(head)
        begin = code.atomic_rmw("add", code.plus(job, _NEXT), takes, "monotonic")
        code.cbranch(code.icmp_signed("<", begin, count), body, done)
        code.position_at_end(body)
        code.call(run, [task, begin, code.smaller(code.add(begin, takes), count)])
        code.branch(head)
        code.position_at_end(done)
        write(own)
        code.ret_void()
        self._worker = code.made

    def compute(self, code: Code, task: Any, count: Any, takes: Any, work: Any) -> None:
        """All parts; the function that is being written ends with this. work: multiplications in all."""
        if self._worker is not None and self._shared_work is not None:
            is_large = code.icmp_signed(">=", work, code.number(self._shared_work))
            ask = declared(code.module, "omp_get_max_threads", WORD, [])
            start = declared(code.module, "GOMP_parallel", NOTHING, [self._worker.type, BYTES, WORD, WORD])
            job = code.alloca(INT, 5)
            with code.if_then(is_large):
                threads = code.call(ask, [])
                with code.if_then(code.icmp_signed(">", threads, ir.Constant(WORD, 1))):
                    read, _ = arithmetic(code)
                    for at, value in enumerate((code.number(0), takes, count, read(), code.ptrtoint(task, INT))):
                        code.store(value, code.plus(job, at))
                    code.call(start, [self._worker, code.bitcast(job, BYTES), threads, ir.Constant(WORD, 0)])
                    code.ret_void()
        code.call(self._run, [task, code.number(0), count])
        code.ret_void()


def declared(module: ir.Module, name: str, result: Any, types: list[Any]) -> ir.Function:
    found = module.globals.get(name)
    return found or ir.Function(module, ir.FunctionType(result, types), name)
