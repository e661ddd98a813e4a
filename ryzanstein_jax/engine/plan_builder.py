"""Turns the scheduler's choice for a step into a `StepPlan`, from arrays that are kept between steps.

A running sequence has a *slot*: a row of the page-table array and of the array of sampling settings. They
are filled once; a step then picks its slots with one indexing operation instead of a loop over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ryzanstein_jax.engine.executor import ExecutorLimits
from ryzanstein_jax.engine.sequence import Sequence
from ryzanstein_jax.plan import BIAS, ROW, StepPlan

#: Settings of a row that scores a token of a prompt: the model's own distribution, nothing sampled.
_SCORING_ROW = np.array([(0, 0, 0, (0, 0), 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, -1)], ROW)


@dataclass(frozen=True, slots=True)
class PoolPart:
    """What one pool of a step stands for: the sum over tokens `begin` to `end` of a sequence's prompt.

    Attributes:
        pool: its number in the step.
    """

    pool: int
    sequence: Sequence
    begin: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence has all that it wants with it."""
        return self.end == self.sequence.prompt_len


@dataclass(slots=True)
class StepRows:
    """What the rows of one step stand for.

    Attributes:
        step: number of the step.
        sampled: (row, sequence) of each token to sample.
        scored: (row, sequence, position) of each prompt token to score.
        pooled: the parts of embeddings.
        members: all sequences of the step, also those without a row.
    """

    step: int
    sampled: list[tuple[int, Sequence]] = field(default_factory=list)
    scored: list[tuple[int, Sequence, int]] = field(default_factory=list)
    pooled: list[PoolPart] = field(default_factory=list)
    members: list[Sequence] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sampled) + len(self.scored)

    def drop_ended(self) -> None:
        """A sequence may have been aborted, or stopped by its previous token, while this step ran."""
        self.sampled = [(row, sequence) for row, sequence in self.sampled if not sequence.finished]
        self.scored = [entry for entry in self.scored if not entry[1].finished]
        self.pooled = [part for part in self.pooled if not part.sequence.finished]


class StepRoom:
    """What is left of a step's budget for prompts.

    Attributes:
        chunks: the chunks taken so far.
        promised: keys of the pages that this step fills.
    """

    def __init__(self, limits: ExecutorLimits, num_decodes: int):
        self.num_tokens, self.num_rows = limits.max_prefill_tokens, limits.max_rows - num_decodes
        self._max_chunks = limits.max_prefills
        self.chunks: list[tuple[Sequence, int]] = []
        self.promised: set[bytes] = set()

    @property
    def is_open(self) -> bool:
        return self.num_tokens > 0 and self.num_rows > 0 and len(self.chunks) < self._max_chunks

    def take(self, sequence: Sequence) -> int:
        """Takes the longest chunk of a sequence that fits, and returns its length, at least 1 while open."""
        begin = sequence.num_computed
        length = min(sequence.num_remaining, self.num_tokens)
        rows = 0
        if sequence.scores_prompt:
            # A row for each token, but those whose successor has been scored before a preemption.
            without_row = max(0, sequence.num_scored - 1 - begin)
            length = min(length, without_row + self.num_rows)
            rows = max(0, length - without_row)
        elif length == sequence.num_remaining:
            rows = 1
        self.num_tokens -= length
        self.num_rows -= rows
        self.chunks.append((sequence, length))
        return length


class PlanBuilder:
    """The slots of the running sequences, and plans made from them."""

    def __init__(self, limits: ExecutorLimits):
        self._tables = np.zeros((limits.max_num_seqs, limits.max_pages_per_seq), np.int32)
        self._settings = np.repeat(_SCORING_ROW, limits.max_num_seqs + 1)  # the last one stays a scoring row
        self._scoring_slot = limits.max_num_seqs
        self._mask_words = -(-limits.vocab_size // 32)
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def occupy(self, sequence: Sequence) -> None:
        """Gives a sequence a slot and writes its pages and settings there."""
        sequence.slot = self._free_slots.pop()
        self.write_pages(sequence, 0)
        params = sequence.params
        self._settings[sequence.slot] = (
            0,
            0,
            0,
            sequence.key,
            params.temperature,
            max(params.top_k, 0),
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            sequence.prompt_len,
            -1,
        )

    def vacate(self, sequence: Sequence) -> None:
        """Takes the slot back; its page table becomes zeros again, as plans pad with them."""
        self._tables[sequence.slot, : len(sequence.pages)] = 0
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def write_pages(self, sequence: Sequence, first: int) -> None:
        """Writes a sequence's pages from number `first` on."""
        self._tables[sequence.slot, first : len(sequence.pages)] = sequence.pages[first:]

    def plan(self, step: int, decodes: list[Sequence], chunks: list[tuple[Sequence, int]]) -> tuple[StepPlan, StepRows]:
        """The step that runs one token of each of `decodes` and that many tokens of each of `chunks`.

        Reads the sequences' lengths and changes none.
        """
        count = len(decodes)
        token_ids = [-1 - s.pending_row if s.pending_row >= 0 else s.token_ids[-1] for s in decodes]
        positions = [s.num_computed for s in decodes]
        query_lens = [1] * count
        row_tokens, row_slots, row_seqs = list(range(count)), [s.slot for s in decodes], list(range(count))
        row_positions, row_targets = [position + 1 for position in positions], [-1] * count
        everyone = decodes + [sequence for sequence, _ in chunks]
        meaning = StepRows(step, list(enumerate(decodes)), members=everyone)
        wanted = max([s.num_logprobs for s in decodes], default=-1)
        pools: list[tuple[int, int]] = []

        for number, (sequence, length) in enumerate(chunks, start=count):
            begin = sequence.num_computed
            end = begin + length
            token_offset = len(token_ids) - begin
            token_ids += sequence.token_ids[begin:end]
            positions += range(begin, end)
            query_lens.append(length)
            if sequence.scores_prompt:
                # The logits at a position are those of the token after it.
                for position in range(max(begin + 1, sequence.num_scored), min(end + 1, sequence.prompt_len)):
                    meaning.scored.append((len(row_tokens), sequence, position))
                    row_tokens.append(token_offset + position - 1)
                    row_seqs.append(number)
                    row_slots.append(self._scoring_slot)
                    row_positions.append(position)
                    row_targets.append(sequence.token_ids[position])
                    wanted = max(wanted, sequence.params.prompt_logprobs or 0)
            if sequence.pooling is not None:
                first = begin if sequence.pooling == "mean" else end - 1
                if sequence.pooling == "mean" or end == sequence.num_tokens:
                    meaning.pooled.append(PoolPart(len(pools), sequence, first, end))
                    pools.append((token_offset + first, token_offset + end - 1))
            elif end == sequence.num_tokens:
                meaning.sampled.append((len(row_tokens), sequence))
                row_tokens.append(token_offset + end - 1)
                row_seqs.append(number)
                row_slots.append(sequence.slot)
                row_positions.append(end)
                row_targets.append(-1)
                wanted = max(wanted, sequence.num_logprobs)

        rows = self._settings[row_slots]
        rows["token"], rows["seq"], rows["position"] = row_tokens, row_seqs, row_positions
        rows["target"] = row_targets
        width = max(len(sequence.pages) for sequence in everyone)
        bias = _bias(meaning.sampled, row_positions)
        mask = _mask(meaning.sampled, row_positions, self._mask_words)
        plan = StepPlan(
            step=step,
            num_decodes=count,
            token_ids=np.array(token_ids, np.int32),
            positions=np.array(positions, np.int32),
            query_lens=np.array(query_lens, np.int32),
            page_tables=np.ascontiguousarray(self._tables[[sequence.slot for sequence in everyone], :width]),
            rows=rows,
            full=bool(meaning.scored) or len(bias) > 0 or any(s.uses_full_sampler for _, s in meaning.sampled),
            num_logprobs=wanted,
            bias=bias,
            mask=mask,
            pools=np.array(pools, np.int32).reshape(-1, 2),
        )
        return plan, meaning


def _bias(sampled: list[tuple[int, Sequence]], row_positions: list[int]) -> np.ndarray:
    """BIAS [B]: what `logit_bias` adds, and the stops that `min_tokens` bans for now."""
    entries: list[tuple[int, int, float]] = []
    for row, sequence in sampled:
        if sequence.params.logit_bias:
            entries += [(row, token, value) for token, value in sequence.params.logit_bias.items()]
        # A mask does that too, and knows when a grammar allows nothing but the end.
        if sequence.matcher is None and sequence.banned_until_min and sequence.bans_stops_at(row_positions[row]):
            entries += [(row, token, -np.inf) for token in sequence.banned_until_min]
    return np.array(entries, BIAS)


def _mask(sampled: list[tuple[int, Sequence]], row_positions: list[int], words: int) -> np.ndarray:
    """uint32 [R, words]: the tokens that grammars allow, and all in other rows; [0, 0] where there is no grammar."""
    if all(sequence.matcher is None for _, sequence in sampled):
        return np.zeros((0, 0), np.uint32)
    mask = np.full((len(row_positions), words), 0xFFFFFFFF, np.uint32)
    for row, sequence in sampled:
        if sequence.matcher is not None:
            too_early = sequence.banned_until_min if sequence.bans_stops_at(row_positions[row]) else ()
            mask[row] = sequence.matcher.mask(too_early)[:words]  # a tokenizer may have tokens that its model has not
    return mask
