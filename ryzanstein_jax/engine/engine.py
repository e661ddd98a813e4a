"""`Engine`: requests in, outputs out, over an `Executor`. No JAX here, so it outlives the devices."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.executor import Executor, RestartableExecutor
from ryzanstein_jax.engine.grammar import Grammar, Grammars
from ryzanstein_jax.engine.outputs import RequestState
from ryzanstein_jax.engine.report import SchedulerStats
from ryzanstein_jax.engine.scheduler import Scheduler
from ryzanstein_jax.engine.sequence import Sequence as EngineSequence
from ryzanstein_jax.engine.sequence import drawn_seed, sampling_key
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.engine.validation import validate, validate_prompt
from ryzanstein_jax.errors import (
    ConfigError,
    DeviceStateLostError,
    EngineClosedError,
    RequestError,
    RyzansteinError,
)
from ryzanstein_jax.plan import StepResult
from ryzanstein_jax.request import PoolingParams, RequestOutput, SamplingParams

#: How long `step` waits for lost devices, in seconds, before the caller gets a turn.
_RESTART_SECONDS = 0.1
#: Of a request that generates nothing. With a seed of its own, so that it draws none of those of other requests.
_NOTHING = SamplingParams(temperature=0, seed=0, max_tokens=1, detokenize=False)


class Engine:
    """Runs requests on an executor. Not thread-safe: one thread calls it.

    Args:
        executor: runs the steps; the engine closes it.
        tokenizer: turns tokens into text; None gives token ids only.
        eos_token_ids: tokens that end a completion, unless it ignores them.
        config: the limits of a request and the seed.
        numbers: of the requests in the order in which they run, shared by engines that take over each other's.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
        config: EngineConfig,
        numbers: Iterator[int] | None = None,
    ):
        self._executor, self._tokenizer, self._config = executor, tokenizer, config
        self._limits = executor.limits
        self._eos_token_ids = tuple(token for token in eos_token_ids if 0 <= token < self._limits.vocab_size)
        self._scheduler = Scheduler(executor.limits, enable_prefix_caching=config.enable_prefix_caching)
        self._grammars = Grammars(tokenizer, self._limits.vocab_size, self._eos_token_ids) if tokenizer else None
        self._requests: dict[str, RequestState] = {}
        self._changed: dict[str, RequestOutput] = {}
        self._numbers, self._num_seeds_drawn = numbers or itertools.count(), 0
        self._failure: BaseException | None = None
        self._lost = False  # the executor's devices; `step` asks it for new ones
        self._gave_up: Exception | None = None  # there will be none
        self._closed = False

    # -- Requests ------------------------------------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | PoolingParams,
        *,
        prompt: str | None = None,
        priority: int = 0,
        grammar: Grammar | None = None,
    ) -> None:
        """Queues a request. Those with a lower `priority` run first, then those that came first.

        With `PoolingParams` it brings an embedding and no token.

        Args:
            grammar: what `compile_grammar` made of the parameters, where it was called before.

        Raises:
            RequestError: the request is invalid, or can never run; nothing was changed.
            EngineClosedError: the engine is closed.
            RecoveryExhaustedError: its devices are gone for good.
        """
        self._check_open()
        pooling = params if isinstance(params, PoolingParams) else None
        params = _NOTHING if isinstance(params, PoolingParams) else params
        validate(request_id, params, priority, self._config, vocab_size=self._limits.vocab_size)
        if request_id in self._requests:
            raise RequestError("request_id", request_id, "it is in use: choose one that no unfinished request has")
        if params.stop and self._tokenizer is None:
            raise RequestError("stop", params.stop, "this engine has no tokenizer: use stop_token_ids")
        tokens = validate_prompt(prompt_token_ids, self._scheduler.max_length, self._limits.vocab_size)
        grammar = grammar or self.compile_grammar(params)
        seed = params.seed
        if seed is None:
            seed = drawn_seed(self._config.seed, self._num_seeds_drawn)
            self._num_seeds_drawn += 1
        number = next(self._numbers)
        sequences = [
            EngineSequence(
                request_id,
                tokens,
                params,
                key=sampling_key(seed, index),
                index=index,
                order=(priority, number, index),
                eos_token_ids=self._eos_token_ids,
                matcher=None if grammar is None else grammar.matcher(),
                pooling=None if pooling is None else pooling.pooling,
            )
            for index in range(params.n)
        ]
        state = RequestState(request_id, prompt, tokens, params, sequences, self._tokenizer, pooling)
        for sequence in sequences:
            self._scheduler.add(sequence)
        self._requests[request_id] = state

    def compile_grammar(self, params: SamplingParams) -> Grammar | None:
        """The grammar that the parameters ask for, if they do. Any thread may call this, and it may take a second.

        Raises:
            RequestError: it can't be compiled, or there is no tokenizer.
        """
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            raise RequestError("structured_outputs", "a grammar", "this engine has no tokenizer: leave it out")
        return self._grammars.compile(params.structured_outputs)

    def abort(self, request_id: str) -> bool:
        """Ends a request with finish reason "abort"; the next `step` returns its output.

        Returns:
            Whether there was such a request; one that has finished already is no error.
        """
        state = self._requests.get(request_id)
        if state is None:
            return False
        with self._failing_alone(state):
            for sequence in state.sequences:
                self._end(state, sequence, "abort")
        return True

    def release(self) -> list[RequestState]:
        """Gives up all unfinished requests once the devices are lost (`is_lost`): another engine may take them over."""
        if cast(RestartableExecutor, self._executor).blames_requests:
            self._scheduler.blame()
        self._scheduler.release()
        released, self._requests = list(self._requests.values()), {}
        return released

    def take_over(self, state: RequestState) -> None:
        """Goes on with a request that another engine of the same model released: no token is lost, none comes twice.

        Raises:
            EngineClosedError, RecoveryExhaustedError: as `add`.
        """
        self._check_open()
        self._requests[state.output.request_id] = state
        unfinished = [sequence for sequence in state.sequences if not sequence.finished]
        # All are queued before any is ended, which may end the others too.
        self._end_dropped([sequence for sequence in unfinished if not self._scheduler.take_over(sequence)])

    @property
    def is_lost(self) -> bool:
        """Whether the devices are gone, and `step` waits for new ones."""
        return self._lost

    def has_unfinished(self) -> bool:
        """Whether `step` has something to do: requests, outputs to hand out or steps still on the device."""
        in_flight = self._scheduler.num_in_flight and self._failure is None and not self._closed and not self._lost
        return bool(self._requests or self._changed or in_flight)

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its completion: the model's limit, or what the cache holds."""
        return self._scheduler.max_length

    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    # -- Steps ---------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Hands the next step to the device, then takes the result of the one before it.

        The next step is handed over before the tokens of the last are read, so that the device never waits. Where the
        executor has lost its devices, this waits a moment for new ones; once they are there, every unfinished request
        goes on where it was.

        Returns:
            The requests that got a token or ended. Each `RequestOutput` is one object that grows until
            its request has finished.

        Raises:
            EngineClosedError: the engine is closed, or failed before and was not recovered.
            Exception: whatever the executor raised. Requests are kept: see `recover` and `close`.
        """
        if self._closed or self._failure is not None:
            raise EngineClosedError(
                "the engine is closed"
                if self._closed
                else f"the engine failed ({self._failure!r}): recover or close it"
            )
        if self._lost:
            self._resume()
            return self._take_changed()
        try:
            self._advance()
        except DeviceStateLostError:
            self._failure, self._lost = None, True
            for state in self._requests.values():
                state.output.timings.note_lost()
        return self._take_changed()

    def _take_changed(self) -> list[RequestOutput]:
        changed, self._changed = list(self._changed.values()), {}
        return changed

    def _advance(self) -> None:
        with self._failing_on(BaseException):
            # Two are in flight already where the last call was interrupted while it waited.
            plan = self._scheduler.schedule() if self._scheduler.num_in_flight < 2 else None
            if plan is not None:
                self._executor.submit(plan)
                self._note_scheduled()
        if self._scheduler.num_in_flight == 2 or (plan is None and self._scheduler.num_in_flight):
            # An interrupt while waiting changes nothing: the next call waits again.
            with self._failing_on(Exception):
                result = self._executor.collect()
            with self._failing_on(BaseException):
                self._commit(result)
        elif plan is None and self._scheduler.has_unfinished:
            raise RyzansteinError(f"the scheduler is stuck: {self._scheduler.stats()}")
        if not self._scheduler.num_in_flight and not self._scheduler.has_unfinished:
            with self._failing_on(Exception):
                self._scheduler.check()

    def _resume(self) -> None:
        """Waits a moment for the executor to be there again, then goes on."""
        executor = cast(RestartableExecutor, self._executor)
        try:
            ready = executor.restart(_RESTART_SECONDS, len(self._requests))
        except RyzansteinError as error:
            self._gave_up, self._lost = error, False
            self._scheduler.reset()
            for state in list(self._requests.values()):
                self._fail(state, error, "error")
            return
        if ready:
            if executor.blames_requests:  # known by now; see `Scheduler.blame`
                self._scheduler.blame()
            self.recover()

    def _note_scheduled(self) -> None:
        for sequence in self._scheduler.take_admitted():
            state = self._requests.get(sequence.request_id)
            if state is not None:
                state.note_scheduled(sequence)

    def _commit(self, result: StepResult) -> None:
        rows = self._scheduler.commit(result)
        for row, sequence, position in rows.scored:
            state = self._requests.get(sequence.request_id)
            if state is None:
                continue  # it failed a row ago
            with self._failing_alone(state):
                state.score_prompt(sequence, position, result, row)
                self._changed[sequence.request_id] = state.output
        for part in rows.pooled:
            state = self._requests.get(part.sequence.request_id)
            if state is None:
                continue
            with self._failing_alone(state):
                state.pool(part, result)
                if part.sequence.finished:
                    self._end(state, part.sequence, "stop")
        for row, sequence in rows.sampled:
            state = self._requests.get(sequence.request_id)
            if state is None:
                continue
            self._changed[sequence.request_id] = state.output
            with self._failing_alone(state):
                if sequence.error is not None:
                    raise sequence.error
                stop = state.append(sequence, result, row)
                if stop is not None:
                    # It may have reached its length with this very token; the stop string tells more.
                    self._scheduler.finish(sequence, "stop", stop)
                    sequence.finish_reason, sequence.stop_reason = "stop", stop
                if sequence.finished:
                    self._end(state, sequence, "stop")

    # -- Ends ----------------------------------------------------------------------------------------------------

    def recover(self, executor: Executor | None = None) -> None:
        """Goes on after the device's state was lost: every unfinished request continues where it was.

        What was computed is computed again, on the new executor; tokens that were handed out stay, and the
        next ones are sampled with the keys they would have had. Requests that the new executor has no room for end.

        Args:
            executor: the new one; None keeps the old one, which must have no step in flight and expect step 0.

        Raises:
            EngineClosedError: the engine is closed.
            ConfigError: the new executor runs another model.
        """
        if self._closed:
            raise EngineClosedError("the engine is closed: make a new one")
        executor = executor or self._executor
        if executor.limits.vocab_size != self._limits.vocab_size:
            raise ConfigError("executor", f"vocab_size {executor.limits.vocab_size}", "recover with the same model")
        self._executor, self._limits = executor, executor.limits
        self._failure, self._gave_up, self._lost = None, None, False
        self._end_dropped(self._scheduler.reset(executor.limits))

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed: make a new one")
        if self._gave_up is not None:
            raise self._gave_up.with_traceback(None)  # it would grow with each request that is turned away

    def _end_dropped(self, sequences: Iterable[EngineSequence]) -> None:
        """Ends requests of which a sequence can't go on."""
        for sequence in sequences:
            state = self._requests.get(sequence.request_id)
            if state is None:
                continue
            with self._failing_alone(state):
                if sequence.error is not None:
                    raise sequence.error
                self._end(state, sequence, "length")

    def close(self) -> list[RequestOutput]:
        """Ends every unfinished request with finish reason "abort" and an `EngineClosedError`; closes the executor.

        Returns:
            All outputs that no `step` has returned yet, those requests' among them.
        """
        if self._closed:
            return []
        self._closed = True
        for state in list(self._requests.values()):
            self._fail(state, EngineClosedError("the engine was closed before the request finished"), "abort")
        outputs, self._changed = list(self._changed.values()), {}
        self._executor.close()
        return outputs

    def _end(self, state: RequestState, sequence: EngineSequence, reason: str) -> None:
        """Ends a sequence, with `reason` unless it had one, and its request with the last of its sequences."""
        self._scheduler.finish(sequence, reason)
        self._changed[sequence.request_id] = state.output
        state.end(sequence)
        if state.output.finished:
            self._requests.pop(sequence.request_id, None)

    def _fail(self, state: RequestState, error: Exception, reason: str) -> None:
        for sequence in state.sequences:
            self._scheduler.finish(sequence, reason)
        state.fail(error, reason)
        self._changed[state.output.request_id] = state.output
        self._requests.pop(state.output.request_id, None)

    @contextmanager
    def _failing_alone(self, state: RequestState) -> Iterator[None]:
        """What goes wrong with one request ends that request only."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes to the one who asked
            self._fail(state, error, "error")

    @contextmanager
    def _failing_on(self, kind: type[BaseException]) -> Iterator[None]:
        """What goes wrong here leaves the device's state unknown: no step until `recover`."""
        try:
            yield
        except kind as error:
            self._failure = error
            raise
