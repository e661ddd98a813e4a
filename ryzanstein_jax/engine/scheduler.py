"""Who runs in the next step: continuous batching with chunked prefill, preemption and one step run ahead.

Each step runs one token of every sequence that decodes, and beside them chunks of prompts up to a budget, so that
the weights are read once for both. First come, first served; among priorities the lower number goes first.

Running ahead: `schedule` may be called for step n+1 while the result of step n is still out. A token that step n
samples then enters the plan as a reference to its row. Steps run in order on the device, hence:

- Pages may be shared as soon as the step that fills them is handed over: whoever reads them comes later.
- Pages of a sequence that ended may be handed out at once, even while a step in flight still writes a token
  of the dead sequence to them: the new owner writes later, and reads only what it wrote. Such a late write never hits a
  page that can be found by its key, since a page gets its key when all its tokens are handed over.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from operator import attrgetter

from ryzanstein_jax.engine.blocks import PagePool
from ryzanstein_jax.engine.executor import ExecutorLimits
from ryzanstein_jax.engine.plan_builder import PlanBuilder, StepRoom, StepRows
from ryzanstein_jax.engine.report import SchedulerStats
from ryzanstein_jax.engine.sequence import Sequence
from ryzanstein_jax.engine.suspects import Suspects, conviction
from ryzanstein_jax.errors import RequestError, RyzansteinError
from ryzanstein_jax.plan import StepPlan, StepResult

_by_order = attrgetter("order")


#: Waiting sequences that one step looks at, at most: those that wait for a page being computed are passed over.
_MOST_HELD = 256


class SampledTokenError(RyzansteinError):
    """The device sampled a token that does not exist."""


class StepMismatchError(RyzansteinError):
    """An executor answered another step than the oldest in flight, or with another number of rows."""


class Scheduler:
    """Owns the sequences' state and the pages. `schedule` and `commit` alternate, at most one step ahead."""

    def __init__(self, limits: ExecutorLimits, *, enable_prefix_caching: bool = True):
        self.enable_prefix_caching = enable_prefix_caching
        self.waiting: list[Sequence] = []  # both lists in order
        self.running: list[Sequence] = []
        self._suspects = Suspects()
        self._num_steps = self._num_preemptions = self._num_prefix_queries = self._num_prefix_hits = 0
        self._build(limits)

    def _build(self, limits: ExecutorLimits) -> None:
        self.limits = limits
        self.pool = PagePool(limits.num_pages, limits.page_size, enable_prefix_caching=self.enable_prefix_caching)
        self._builder = PlanBuilder(limits)
        self._in_flight: deque[StepRows] = deque()
        self._next_step = 0
        self._admitted: list[Sequence] = []
        # The last token of a sequence is never an input, so it needs no place in a page.
        self.max_length = min(limits.max_model_len, (limits.num_pages - 1) * limits.page_size + 1)

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled and not yet committed."""
        return len(self._in_flight)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            RequestError: it is too long ever to run.
        """
        self._set_max_length(sequence)
        insort(self.waiting, sequence, key=_by_order)

    def _set_max_length(self, sequence: Sequence) -> None:
        if len(sequence.token_ids) >= self.max_length:
            raise RequestError(
                "prompt_token_ids",
                f"{len(sequence.token_ids)} tokens",
                f"use at most {self.max_length - 1}: the model's limit is {self.limits.max_model_len} tokens, and the "
                f"KV cache holds {(self.limits.num_pages - 1) * self.limits.page_size}",
            )
        longest = sequence.longest
        sequence.max_length = self.max_length if longest is None else min(longest, self.max_length)

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """Ends a sequence, wherever it is, and frees its pages. Tokens still in flight for it are dropped."""
        if sequence.finished:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if sequence.is_running:
            _remove(self.running, sequence)
            self._leave(sequence)
        else:
            _remove(self.waiting, sequence)

    def schedule(self) -> StepPlan | None:
        """The next step, or None where nothing can run before the steps in flight are committed."""
        assert len(self._in_flight) < 2, "a plan can refer to the tokens of the step before it only"
        preemptions = self._num_preemptions
        alone = self._suspects.alone()
        if alone is not None and not alone.is_running:
            if self._in_flight:
                return None
            for sequence in self.running.copy():  # so that there are pages for it
                self._preempt(sequence)
            preemptions = self._num_preemptions
        decodes = self._pick_decodes(alone)
        # Room was just taken from a running sequence: a waiting one must not take it back in the same step.
        chunks = self._pick_chunks(decodes, alone, admit=self._num_preemptions == preemptions)
        if not decodes and not chunks:
            return None
        plan, rows = self._builder.plan(self._next_step, decodes, chunks)
        self._advance(decodes, chunks, rows)
        return plan

    def take_admitted(self) -> list[Sequence]:
        """Sequences that began to run, or resumed, since the last call."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def commit(self, result: StepResult) -> StepRows:
        """Takes the sampled tokens of the oldest step in flight.

        Returns:
            What the result's rows stand for, without the rows of sequences that had ended before. A sequence's
            `finish_reason` is set where its token ended it.

        Raises:
            StepMismatchError: the result is not that step's.
        """
        if not self._in_flight or self._in_flight[0].step != result.step:
            raise StepMismatchError(f"result of step {result.step}, expected one of {list(self._in_flight)[:1]}")
        rows = self._in_flight.popleft()
        found = len(result.tokens), len(result.pooled)
        if found != (len(rows), len(rows.pooled)):
            wanted = f"{len(rows)} rows and {len(rows.pooled)} pools"
            raise StepMismatchError(f"step {result.step} has {wanted}, its result {found[0]} and {found[1]}")
        tokens = result.tokens.tolist()
        rows.drop_ended()
        for _, sequence, position in rows.scored:
            sequence.num_scored_known = position + 1
        for row, sequence in rows.sampled:
            if sequence.pending_step == rows.step:
                sequence.pending_row = sequence.pending_step = -1
            self._append(sequence, tokens[row])
        for part in rows.pooled:
            if part.is_last:
                self.finish(part.sequence, "stop")
        return rows

    def blame(self) -> None:
        """The device's state is lost: whoever was on it may be the reason. Call `reset` to go on."""
        self._suspects.blame(member for rows in self._in_flight for member in rows.members)

    def reset(self, limits: ExecutorLimits | None = None) -> list[Sequence]:
        """The device's state is lost: every unfinished sequence starts over from its known tokens.

        Steps are numbered from 0 again. A pending token is sampled again with the same key at the same position.

        Args:
            limits: those of the new executor, where they changed.

        Returns:
            Sequences that no longer fit, which ended with "length", or "error" if they had produced nothing; and those
            that lost the device's state too often, which ended with "error".
        """
        return [sequence for sequence in self.release(limits) if not self.take_over(sequence)]

    def release(self, limits: ExecutorLimits | None = None) -> list[Sequence]:
        """Begins anew as `reset` does, without its unfinished sequences: another scheduler may take them over."""
        unfinished, self.running, self.waiting = self.running + self.waiting, [], []
        self._suspects = Suspects()
        self._build(limits or self.limits)
        for sequence in unfinished:
            sequence.forget_device()
        return unfinished

    def take_over(self, sequence: Sequence) -> bool:
        """Queues a released sequence; False where it ended instead, for the reasons that `reset` has."""
        self._suspects.take_over(sequence)
        sequence.error = conviction(sequence)
        if sequence.error is not None:
            sequence.finish_reason = "error"
            return False
        try:
            self.add(sequence)
        except RequestError as error:
            produced = len(sequence.token_ids) > sequence.prompt_len
            sequence.finish_reason = "length" if produced else "error"
            sequence.error = None if produced else error
            return False
        return True

    def check(self) -> None:
        """Raises PagePoolError unless every page is owned exactly as counted."""
        self.pool.check(sequence.pages for sequence in self.running)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_pages=self.limits.num_pages - 1,
            num_pages_used=self.pool.num_used,
            num_pages_idle=self.pool.num_idle,
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
        )

    # -- Choosing ------------------------------------------------------------------------------------------------

    def _pick_decodes(self, alone: Sequence | None) -> list[Sequence]:
        """Running sequences with one token to run, each with a page for it. Preempts from the end where pages lack."""
        decodes = []
        page_size = self.limits.page_size
        for sequence in self.running.copy():
            if alone is not None and sequence is not alone:
                continue
            if sequence.num_remaining != 1 or not sequence.may_sample or not sequence.is_running:
                continue
            if sequence.awaits_token:
                continue
            if sequence.num_computed >= len(sequence.pages) * page_size and not self._grow(sequence):
                continue
            assert sequence.pending_row < 0 or sequence.pending_step == self._next_step - 1
            decodes.append(sequence)
        return decodes

    def _grow(self, sequence: Sequence) -> bool:
        """One page more for a sequence, at the cost of later ones if need be; False where it was itself the last."""
        while (pages := self.pool.acquire(1)) is None:
            # Those before it in order have been picked for this step already; those behind have not.
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += pages
        self._builder.write_pages(sequence, len(sequence.pages) - 1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue; later its prompt and completion are computed again, but for what is still cached."""
        _remove(self.running, sequence)
        self._leave(sequence)
        sequence.num_cached = sequence.num_computed = sequence.num_registered = 0
        insort(self.waiting, sequence, key=_by_order)
        self._num_preemptions += 1

    def _pick_chunks(
        self, decodes: list[Sequence], alone: Sequence | None, *, admit: bool
    ) -> list[tuple[Sequence, int]]:
        """Chunks of prompts: of those that run first, then of waiting sequences while there is room.

        A waiting sequence that turns out to have a single token left to run joins `decodes` instead.
        """
        room = StepRoom(self.limits, len(decodes))
        for sequence in self.running:
            if sequence.runs_as_chunk and alone in (None, sequence):
                if not room.is_open:
                    return room.chunks
                self._take_chunk(sequence, room)
        if admit and (alone is None or not alone.is_running):
            self._admit(decodes, room, alone)
        return room.chunks

    def _take_chunk(self, sequence: Sequence, room: StepRoom) -> None:
        first = sequence.num_computed // self.limits.page_size
        last = (sequence.num_computed + room.take(sequence)) // self.limits.page_size
        room.promised.update(self._keys(sequence, last)[first:])

    def _admit(self, decodes: list[Sequence], room: StepRoom, alone: Sequence | None) -> None:
        page_size = self.limits.page_size
        # Of the first waiting sequence not passed over.
        index = first = 0 if alone is None else bisect_left(self.waiting, alone.order, key=_by_order)
        while room.is_open and self._builder.num_free_slots and index < min(len(self.waiting), first + _MOST_HELD):
            sequence = alone or self.waiting[index]
            assert sequence.pending_row < 0, "its last token is a step old by now, so it must be known"
            shared: list[int] = []
            # At least one token is left to run: its logits are what the next one is sampled from.
            keys = [] if sequence.needs_whole_prompt else self._keys(sequence, (sequence.num_tokens - 1) // page_size)
            if keys:
                shared = self.pool.match(keys)
                if len(shared) < len(keys) and keys[len(shared)] in room.promised:
                    index += 1  # what it needs next is computed in this very step: in the next one it can share it
                    continue
            # All pages of its known tokens at once, and one left for each running sequence to grow into: else it
            # would soon be preempted for what it was given.
            needed = -(-sequence.num_tokens // page_size) - len(shared)
            pages = self.pool.acquire(needed, shared, reserve=len(self.running))
            if pages is None:
                return
            del self.waiting[index]
            insort(self.running, sequence, key=_by_order)
            sequence.pages, sequence.num_registered = pages, len(shared)
            sequence.num_cached = sequence.num_computed = len(shared) * page_size
            self._builder.occupy(sequence)
            self._admitted.append(sequence)
            self._num_prefix_queries += len(keys) * page_size
            self._num_prefix_hits += sequence.num_cached
            if sequence.runs_as_chunk:
                self._take_chunk(sequence, room)
            else:
                decodes.append(sequence)
                room.num_rows -= 1
            if alone is not None:
                return

    # -- Bookkeeping ---------------------------------------------------------------------------------------------

    def _advance(self, decodes: list[Sequence], chunks: list[tuple[Sequence, int]], rows: StepRows) -> None:
        """Moves the lengths on: the step counts as computed from here, for every later step."""
        for sequence in decodes:
            sequence.num_computed += 1
        for sequence, length in chunks:
            sequence.num_computed += length
            if sequence.scores_prompt:
                scored = min(sequence.num_computed + 1, sequence.prompt_len)
                sequence.num_scored = max(sequence.num_scored, scored)
            self._register(sequence)
        for row, sequence in rows.sampled:
            sequence.num_tokens += 1
            sequence.pending_row, sequence.pending_step = row, rows.step
        self._in_flight.append(rows)
        self._next_step += 1
        self._num_steps += 1

    def _append(self, sequence: Sequence, token: int) -> None:
        """Takes a token of a sequence, which may end it."""
        try:
            if not 0 <= token < self.limits.vocab_size:
                raise SampledTokenError(f"token {token} was sampled, of a vocabulary of {self.limits.vocab_size}")
            end = sequence.append(token)
        except (SampledTokenError, RequestError) as error:
            sequence.error = error
            self.finish(sequence, "error")
            return
        self._suspects.clear_if_past(sequence)
        if sequence.is_running:
            self._register(sequence)
        if end is not None:
            self.finish(sequence, *end)

    def _register(self, sequence: Sequence) -> None:
        """Makes pages findable whose tokens are all known and handed to the device."""
        if not self.enable_prefix_caching:
            return
        first = sequence.num_registered
        full = min(sequence.num_computed, len(sequence.token_ids)) // self.limits.page_size
        if full > first:
            keys = self._keys(sequence, full)
            for page in range(first, full):
                self.pool.register(sequence.pages[page], keys[page])
            sequence.num_registered = full

    def _leave(self, sequence: Sequence) -> None:
        """Takes slot and pages from a running sequence."""
        self._builder.vacate(sequence)
        self.pool.release(sequence.pages)
        sequence.pages = []

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of a sequence's first `count` full pages; none without prefix caching."""
        if not self.enable_prefix_caching:
            return []
        self.pool.extend_keys(sequence.page_keys, sequence.token_ids, count)
        return sequence.page_keys[:count]


def _remove(ordered: list[Sequence], sequence: Sequence) -> None:
    """Removes a sequence from a list that is sorted by `order`, which no two sequences share."""
    index = bisect_left(ordered, sequence.order, key=_by_order)
    assert ordered[index] is sequence
    del ordered[index]
