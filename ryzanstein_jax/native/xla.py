"""Kernels as XLA's foreign functions: each is called with a frame of buffers, and cut into tasks for XLA's threads.

The layout of frames is that of XLA's C interface (`xla/ffi/api/c_api.h`, in jaxlib's include folder), version 0.3 and
later: XLA keeps it stable, and refuses a handler whose version it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from ryzanstein_jax.native.emit import I32, I64, PTR, Code

#: Version of the interface that this was written for; jax 0.10 to 0.12 have 0.3 to 0.5.
API = (0, 3)

# Bytes from the beginning of each structure.
_FRAME_EXTENSION, _FRAME_API, _FRAME_CONTEXT, _FRAME_ARGS, _FRAME_RESULTS = 8, 16, 24, 72, 112
_BUFFER_DATA, _BUFFER_DIMS = 24, 40
_EXTENSION_TYPE, _EXTENSION_METADATA = 8, 24
_METADATA_MAJOR, _METADATA_MINOR, _METADATA_TRAITS = 24, 28, 32
_METADATA_EXTENSION = 1
_API_ERROR_DESTROY, _API_SCHEDULE, _API_NUM_THREADS = 48 + 2 * 8, 48 + 11 * 8, 48 + 12 * 8

# What the threads of one call share: the next task, tasks done, tasks in all, the frame, and who still uses it.
_NEXT, _DONE, _COUNT, _FRAME, _USERS, _STATE_BYTES = 0, 1, 2, 3, 4, 64
#: How often to look whether others are done before the processor is offered to them: some tens of microseconds.
_PATIENCE = 1 << 15


class Buffers:
    """The operands and results of a call, inside the code of a kernel.

    Attributes:
        data: address of each, operands first.
    """

    def __init__(self, code: Code, frame: Any, operands: int, results: int):
        self._code, self._frame, self._buffers = code, frame, []
        for offset, count in ((_FRAME_ARGS, operands), (_FRAME_RESULTS, results)):
            table = _field(code, frame, offset)
            self._buffers += [code.load(code.at(table, number, PTR), typ=PTR) for number in range(count)]
        self.data = [_field(code, buffer, _BUFFER_DATA) for buffer in self._buffers]

    def dim(self, number: int, axis: int) -> Any:
        """Size of an axis, int64."""
        dims = _field(self._code, self._buffers[number], _BUFFER_DIMS)
        return self._code.load(self._code.at(dims, axis, I64), typ=I64)

    def threads(self) -> Any:
        """How many threads there are to share a call, int64."""
        return _num_threads(self._code, self._frame)


def add_handler(
    module: ir.Module,
    name: str,
    lanes: int,
    operands: int,
    results: int,
    count: Callable[[Code, Buffers], Any],
    task: Callable[[Code, Buffers, Any], None],
) -> None:
    """Adds a function that XLA may call under that name.

    Args:
        module: takes it.
        lanes: as `Code` takes it.
        operands, results: how many.
        count: writes code that gives the number of tasks, int64.
        task: writes code that does the task of a number. Tasks run at once, in any order.
    """
    run = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR, I64]), f"{name}.task")
    code = Code(run.append_basic_block(), lanes)
    task(code, Buffers(code, run.args[0], operands, results), run.args[1])
    code.ret_void()
    loop, share = _add_share(module, name, run)
    handler = ir.Function(module, ir.FunctionType(PTR, [PTR]), name)
    frame = handler.args[0]
    code = Code(handler.append_basic_block(), lanes)
    with code.if_then(_is_set(code, _field(code, frame, _FRAME_EXTENSION))):
        _describe(code, _field(code, frame, _FRAME_EXTENSION))
    tasks = count(code, Buffers(code, frame, operands, results))
    threads = code.least(_num_threads(code, frame), tasks)
    with code.if_then(code.icmp_signed("<=", threads, code.int(1))):
        with code.loop(0, tasks) as number:
            code.call(run, (frame, number))
        code.ret(ir.Constant(PTR, None))
    state = code.call(_external(module, "malloc", PTR, I64), (code.int(_STATE_BYTES),))
    for place, value in ((_NEXT, 0), (_DONE, 0), (_COUNT, tasks), (_USERS, threads)):
        code.store(code.calc(value), code.at(state, place, I64))
    code.store(frame, code.at(state, _FRAME, PTR))
    with code.loop(1, threads):
        _schedule(code, frame, share, state)
    code.call(loop, (state,))
    _wait(code, module, state)
    _leave(code, module, state)
    code.ret(ir.Constant(PTR, None))


def add_rows_handler(
    module: ir.Module,
    name: str,
    lanes: int,
    operands: int,
    results: int,
    rows: int,
    write: Callable[[Code, Buffers, Any], None],
) -> None:
    """As `add_handler`, of tasks that are so many rows of the first operand; `write` writes code for one of them."""

    def count(code: Code, buffers: Buffers) -> Any:
        return code.calc(buffers.dim(0, 0), "+", rows - 1, "/", rows)

    def task(code: Code, buffers: Buffers, number: Any) -> None:
        first = code.calc(number, "*", rows)
        with code.loop(first, code.least(code.calc(first, "+", rows), buffers.dim(0, 0))) as row:
            write(code, buffers, row)

    add_handler(module, name, lanes, operands, results, count, task)


def _add_share(module: ir.Module, name: str, run: ir.Function) -> tuple[ir.Function, ir.Function]:
    """Two functions of the shared state: one does tasks until none is left, the other also gives the state up."""
    loop = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR]), f"{name}.loop")
    code = Code(loop.append_basic_block(), 1)
    state = loop.args[0]
    again, work, end = (code.append_basic_block() for _ in range(3))
    code.branch(again)
    code.position_at_end(again)
    number = code.atomic_rmw("add", code.at(state, _NEXT, I64), code.int(1), "acq_rel")
    code.cbranch(code.icmp_signed("<", number, code.get(state, _COUNT, I64)), work, end)
    code.position_at_end(work)
    code.call(run, (code.load(code.at(state, _FRAME, PTR), typ=PTR), number))
    code.atomic_rmw("add", code.at(state, _DONE, I64), code.int(1), "acq_rel")
    code.branch(again)
    code.position_at_end(end)
    code.ret_void()
    share = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR]), f"{name}.share")
    code = Code(share.append_basic_block(), 1)
    code.call(loop, (share.args[0],))
    _leave(code, module, share.args[0])
    code.ret_void()
    return loop, share


def _leave(code: Code, module: ir.Module, state: Any) -> None:
    """The last one frees the state: a thread may come late, when the call has long returned."""
    users = code.atomic_rmw("sub", code.at(state, _USERS, I64), code.int(1), "acq_rel")
    with code.if_then(code.icmp_signed("==", users, code.int(1))):
        code.call(_external(module, "free", ir.VoidType(), PTR), (state,))


def _wait(code: Code, module: ir.Module, state: Any) -> None:
    """Until the tasks that others have begun are done: what nobody has begun, this thread has done itself.

    So it waits only for threads that run, and never for one that has yet to come. It is a matter of microseconds,
    unless there are more threads than processors; then whoever still works needs this one's.
    """
    again, check, end = (code.append_basic_block() for _ in range(3))
    before = code.block
    code.branch(again)
    code.position_at_end(again)
    rounds = code.phi(I64)
    rounds.add_incoming(code.int(0), before)
    done = code.load_atomic(code.at(state, _DONE, I64), "acquire", 8, typ=I64)
    code.cbranch(code.icmp_signed("<", done, code.get(state, _COUNT, I64)), check, end)
    code.position_at_end(check)
    with code.if_then(code.icmp_signed(">=", rounds, code.int(_PATIENCE))):
        code.call(_external(module, "sched_yield", I32), ())
    rounds.add_incoming(code.calc(rounds, "+", 1), code.block)
    code.branch(again)
    code.position_at_end(end)


def _describe(code: Code, extension: Any) -> None:
    """Answers XLA's question for the version that a handler was written for, and ends the call with it."""
    kind = code.load(_place(code, extension, _EXTENSION_TYPE), typ=I32)
    with code.if_then(code.icmp_signed("==", kind, ir.Constant(I32, _METADATA_EXTENSION))):
        metadata = _field(code, extension, _EXTENSION_METADATA)
        for offset, value in ((_METADATA_MAJOR, API[0]), (_METADATA_MINOR, API[1]), (_METADATA_TRAITS, 0)):
            code.store(ir.Constant(I32, value), _place(code, metadata, offset))
        code.ret(ir.Constant(PTR, None))


def _num_threads(code: Code, frame: Any) -> Any:
    """Of XLA's pool; 1 where there is none."""
    found = code.room(I64)
    code.store(code.int(1), found)
    _call_api(code, frame, _API_NUM_THREADS, [found])
    return code.load(found, typ=I64)


def _schedule(code: Code, frame: Any, function: ir.Function, state: Any) -> None:
    failed = _call_api(code, frame, _API_SCHEDULE, [function, state])
    with code.if_then(failed):
        code.atomic_rmw("sub", code.at(state, _USERS, I64), code.int(1), "acq_rel")


def _call_api(code: Code, frame: Any, function: int, arguments: list[Any]) -> Any:
    """Calls one of XLA's functions for handlers; whether it failed."""
    fields = [code.int(8 * (3 + len(arguments))), ir.Constant(PTR, None), _field(code, frame, _FRAME_CONTEXT)]
    room = code.room(I64, 3 + len(arguments))
    for number, value in enumerate([*fields, *arguments]):
        code.store(value, code.at(room, number, I64))
    api = _field(code, frame, _FRAME_API)
    error = code.call(_function(code, api, function, PTR), (room,))
    failed = _is_set(code, error)
    with code.if_then(failed):
        for number, value in enumerate([code.int(24), ir.Constant(PTR, None), error]):
            code.store(value, code.at(room, number, I64))
        code.call(_function(code, api, _API_ERROR_DESTROY, ir.VoidType()), (room,))
    return failed


def _function(code: Code, api: Any, offset: int, returns: ir.Type) -> Any:
    """One of the interface's functions, which all take one pointer."""
    address = code.load(_place(code, api, offset), typ=I64)
    return code.inttoptr(address, ir.FunctionType(returns, [PTR]).as_pointer())


def _place(code: Code, base: Any, offset: int) -> Any:
    return code.at(base, offset, ir.IntType(8))


def _field(code: Code, base: Any, offset: int) -> Any:
    return code.load(_place(code, base, offset), typ=PTR)


def _is_set(code: Code, pointer: Any) -> Any:
    return code.icmp_unsigned("!=", code.ptrtoint(pointer, I64), code.int(0))


def _external(module: ir.Module, name: str, returns: ir.Type, *arguments: ir.Type) -> ir.Function:
    found = module.globals.get(name)
    return found if found is not None else ir.Function(module, ir.FunctionType(returns, arguments), name)
