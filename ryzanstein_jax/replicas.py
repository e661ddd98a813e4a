"""Replicas: engines side by side, each with a thread and devices of its own. No JAX here.

A request belongs to one replica at a time, and all that concerns it happens in that replica's thread. When a replica
loses its devices, its thread hands the requests to the others as they are: their tokens, detokenizers and grammars
live in this process. A replica's own orchestrator replaces the devices meanwhile; then it takes requests again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.executor import Executor, RestartableExecutor
from ryzanstein_jax.engine.outputs import RequestState
from ryzanstein_jax.engine.report import RankUsage, SchedulerStats, SetupReport
from ryzanstein_jax.engine.router import Router
from ryzanstein_jax.errors import EngineClosedError, counted
from ryzanstein_jax.metrics import Metrics
from ryzanstein_jax.orchestrator.events import EventKind
from ryzanstein_jax.orchestrator.orchestrator import MultiGPUOrchestrator
from ryzanstein_jax.orchestrator.states import ENDED
from ryzanstein_jax.request import RequestOutput
from ryzanstein_jax.streams import StreamChunk, StreamCursor

#: How long requests that are about to move wait to learn whether one of them may be the reason, in seconds.
_VERDICT_SECONDS = 0.5
#: How often a replica without devices looks for some, in seconds.
_LOOK_SECONDS = 0.02


class MeasuredExecutor(Executor, Protocol):
    """An executor that tells what it costs: `LocalExecutor` or `MultiGPUOrchestrator`."""

    @property
    def metrics(self) -> Metrics: ...

    @property
    def report(self) -> SetupReport: ...

    def usage(self) -> list[RankUsage]: ...


class Ticket:
    """One request on its way through the replicas.

    Args:
        request_id: no other unfinished request of any replica has it.
        put: takes its chunks, what it failed with, and None at its end; called from replicas' threads.
        size: how many sequences it has.
        keys: of its prompt; see `Router`.
    """

    def __init__(
        self, request_id: str, put: Callable[[StreamChunk | Exception | None], None], size: int, keys: Sequence[bytes]
    ):
        self.request_id, self.put, self.size, self.keys = request_id, put, size, keys
        self.cursor = StreamCursor()
        self.replica: Replica | None = None  # whose it is
        self.moved: float | None = None  # when the last replica lost its devices, until the next token
        self.is_gone = False  # nobody waits for it any more


class Replica:
    """An engine and the thread that steps it.

    Args:
        number: which one it is.
        executor, engine: just made; closed when the thread ends.
        peers: all replicas, itself included.
    """

    def __init__(self, number: int, executor: MeasuredExecutor, engine: Engine, peers: Replicas):
        self.number, self.executor, self.engine, self._peers = number, executor, engine, peers
        self._restartable = cast(RestartableExecutor, executor) if hasattr(executor, "restart") else None
        self._tickets: dict[str, Ticket] = {}
        #: What the thread shall do between steps; None ends it.
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # nothing is put into the inbox after it was emptied for the last time
        self._thread = threading.Thread(target=self._run, name=f"engine-{number}", daemon=True)

    @property
    def _is_alone(self) -> bool:
        return len(self._peers.all) == 1

    # --- from any thread

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return not self._closed and self._thread.is_alive()

    @property
    def is_up(self) -> bool:
        """Whether a request would run now, as far as is known."""
        return self.is_alive and not self.engine.is_lost and (self._restartable is None or self._restartable.is_serving)

    @property
    def has_failed(self) -> bool:
        """Whether it will never run a request again."""
        orchestrator = self.orchestrator
        return not self.is_alive or (orchestrator is not None and orchestrator.state in ENDED)

    @property
    def orchestrator(self) -> MultiGPUOrchestrator | None:
        """What watches its worker processes; None where the devices are in this process."""
        return self.executor if isinstance(self.executor, MultiGPUOrchestrator) else None

    @property
    def metrics(self) -> Metrics:
        return self.executor.metrics

    @property
    def report(self) -> SetupReport:
        return self.executor.report

    def stats(self) -> SchedulerStats:
        """Where its scheduler stands. Read while it works: numbers of one call may be a step apart."""
        return self.engine.stats()

    def usage(self) -> list[RankUsage]:
        """Memory and communication of each rank, or of each device of this process."""
        return self.executor.usage()

    def cpu_seconds(self) -> float:
        """Processor time of the thread; 0 once it has ended."""
        ident = self._thread.ident
        if ident is None or not self._thread.is_alive():
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(ident))

    def start(self) -> None:
        self._thread.start()

    def send(self, what: Callable[[], None]) -> None:
        """Has the thread do something before its next step.

        Raises:
            EngineClosedError: it has ended.
        """
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is closed")
            self._inbox.put(what)

    def end(self) -> None:
        """Tells the thread to end."""
        self._inbox.put(None)

    def join(self) -> None:
        self._thread.join()

    # --- in its thread

    def add(self, ticket: Ticket, begin: Callable[[Engine], None]) -> None:
        """Takes a request that `begin` gives to the engine."""
        try:
            begin(self.engine)
            self._tickets[ticket.request_id] = ticket
        except Exception as error:  # noqa: BLE001 - the caller gets it, whatever it is
            self._peers.leave(ticket)
            ticket.put(error)

    def forget(self, ticket: Ticket) -> None:
        """The caller has gone, or has its answer: what is left of the request is ended, wherever it is by now."""
        if ticket.replica is not self:
            self._peers.forget(ticket)
        elif self._tickets.pop(ticket.request_id, None) is not None:
            self._peers.leave(ticket)
            self.engine.abort(ticket.request_id)

    def _run(self) -> None:
        """What was asked for, then a step, as long as there is something to do."""
        error: Exception = EngineClosedError("the engine was closed before the request ended")
        try:
            while self._take_inbox():
                if self._has_work() and (not self.engine.is_lost or self._may_resume()):
                    for output in self.engine.step():
                        self._deliver(output)
        except Exception as failure:  # noqa: BLE001 - every waiting caller learns of it
            error = EngineClosedError(f"the engine failed: {failure!r}")
            error.__cause__ = failure
        finally:
            with self._lock:
                self._closed = True
            self._drain(error)
            self.engine.close()
            self.executor.close()

    def _has_work(self) -> bool:
        # Where devices were lost, `step` asks for new ones also while there is nothing to run on them.
        return self.engine.has_unfinished() or self.engine.is_lost

    def _take_inbox(self) -> bool:
        """Does what was sent; waits for it while there is nothing to step. False ends the thread."""
        block = not self._has_work()
        timeout = None
        if self.engine.is_lost and not self._is_alone:
            block, timeout = True, _LOOK_SECONDS
        while True:
            try:
                what = self._inbox.get(block, timeout)
            except queue.Empty:
                return True
            if what is None:
                return False
            what()
            block = False

    def _may_resume(self) -> bool:
        """The devices are gone: whoever has some goes on with the requests. Whether to ask for new ones now."""
        if self._is_alone:
            return True
        seen = time.monotonic()
        assert self._restartable is not None
        self._restartable.await_verdict(_VERDICT_SECONDS)
        if self._restartable.is_serving:  # they have come; or they were lost, and replaced, while nothing ran
            return True
        has_failed = self.has_failed  # as of now: where nobody will come, its requests end
        if self._tickets and self._peers.refuges(self):
            self._move_out(seen)
        return has_failed

    def _move_out(self, seen: float) -> None:
        moved = 0
        self._peers.router.forget(self.number)
        for state in self.engine.release():
            ticket = self._tickets.pop(state.output.request_id, None)
            if ticket is not None:
                ticket.moved = seen if ticket.moved is None else ticket.moved
                self._peers.move(ticket, self, state)
                moved += 1
        self.metrics.count("requests_moved", moved)
        if self.orchestrator is not None:
            message = f"{counted(moved, 'request')} moved to other replicas"
            self.orchestrator.events.record(EventKind.MOVED, message, requests=moved)

    def take_over(self, ticket: Ticket, state: RequestState) -> None:
        """Goes on with a request of another replica."""
        if ticket.is_gone:
            self._peers.leave(ticket)
            return
        try:
            self.engine.take_over(state)
            self._tickets[ticket.request_id] = ticket
        except Exception as error:  # noqa: BLE001 - the caller gets it, whatever it is
            self._peers.leave(ticket)
            ticket.put(error)

    def _deliver(self, output: RequestOutput) -> None:
        ticket = self._tickets.get(output.request_id)
        if ticket is None:
            return
        for chunk in ticket.cursor.advance(output):
            if ticket.moved is not None:
                self.metrics.observe("move_seconds", time.monotonic() - ticket.moved)
                ticket.moved = None
            ticket.put(chunk)
        if output.finished:
            del self._tickets[output.request_id]
            self._peers.leave(ticket)
            ticket.put(output.error)

    def _drain(self, error: Exception) -> None:
        """Nobody waits for ever: those listening, and those whose request was never added, get the error."""
        while True:
            try:
                what = self._inbox.get_nowait()
            except queue.Empty:
                break
            if what is not None:
                what()
        for ticket in self._tickets.values():
            self._peers.leave(ticket)
            ticket.put(error)
        self._tickets.clear()


class Replicas:
    """All replicas, and who gets which request.

    Args:
        parts: executor and engine of each; the engines share their `numbers`.
        page_size: tokens of a page of the KV cache.
    """

    def __init__(self, parts: Sequence[tuple[MeasuredExecutor, Engine]], page_size: int):
        self.router = Router(len(parts), page_size, parts[0][0].limits.num_pages)
        self.all = [Replica(number, executor, engine, self) for number, (executor, engine) in enumerate(parts)]
        for replica in self.all:
            replica.start()

    def keys(self, token_ids: Sequence[int]) -> list[bytes]:
        """Of a prompt, as `Ticket` takes them."""
        return self.router.keys(token_ids) if len(self.all) > 1 else []

    def submit(self, ticket: Ticket, begin: Callable[[Engine], None]) -> None:
        """Has a replica take a request, which `begin` adds to its engine, in the replica's thread.

        Raises:
            EngineClosedError: the replicas are closed.
        """
        replica = self._place(ticket, self.all)
        try:
            replica.send(partial(replica.add, ticket, begin))
        except EngineClosedError:
            self.leave(ticket)
            raise

    def forget(self, ticket: Ticket) -> None:
        """Ends what is left of a request."""
        assert ticket.replica is not None
        ticket.is_gone = True
        try:
            ticket.replica.send(partial(ticket.replica.forget, ticket))
        except EngineClosedError:
            pass  # it ended with the engine

    def refuges(self, replica: Replica) -> list[Replica]:
        """Where a replica without devices can have its requests run."""
        others = [other for other in self.all if other is not replica]
        up = [other for other in others if other.is_up]
        return up or [other for other in others if replica.has_failed and not other.has_failed]

    def move(self, ticket: Ticket, source: Replica, state: RequestState) -> None:
        """Hands a request that its replica released to another one."""
        self.leave(ticket)
        target = self._place(ticket, self.refuges(source) or [other for other in self.all if other is not source])
        try:
            target.send(partial(target.take_over, ticket, state))
        except EngineClosedError as error:
            self.leave(ticket)
            ticket.put(error)

    def leave(self, ticket: Ticket) -> None:
        """A request has left its replica."""
        assert ticket.replica is not None
        self.router.leave(ticket.replica.number, ticket.size)

    def close(self) -> None:
        """Ends what is under way with a typed error, and frees the devices. May be called again."""
        for replica in self.all:
            replica.end()
        for replica in self.all:
            replica.join()

    def _place(self, ticket: Ticket, among: Sequence[Replica]) -> Replica:
        for suits in (lambda one: one.is_up, lambda one: not one.has_failed, lambda one: one.is_alive):
            if found := [replica.number for replica in among if suits(replica)]:
                break
        number = self.router.take(ticket.keys, ticket.size, found or [replica.number for replica in among])
        ticket.replica = self.all[number]
        return ticket.replica
