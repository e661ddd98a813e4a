"""An executor without a device: each token is a hash of all that the model would have seen through the pages.

A wrong page, a wrong position, a token that was never written or that another sequence overwrote, a wrong key or
setting: each shows as another token than that of `reference`, which computes a request alone and without pages.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from ryzanstein_jax.engine.executor import ExecutorLimits
from ryzanstein_jax.engine.grammar import Matcher
from ryzanstein_jax.plan import StepPlan, StepResult
from ryzanstein_jax.request import SamplingParams

UNWRITTEN = -1


def limits(**changes: int) -> ExecutorLimits:
    settings = {
        "num_pages": 33,
        "page_size": 4,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_prefill_tokens": 16,
        "max_prefills": 2,
        "max_rows": 8,
        "vocab_size": 40,
    }
    return ExecutorLimits(**{**settings, **changes})


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def sample(
    tokens: Sequence[int], vocab: int, key: Iterable[int], settings: Sequence[float], banned: Collection[int] = ()
) -> int:
    """The token that follows `tokens`."""
    token = digest(list(tokens), [int(word) for word in key], [round(float(x), 4) for x in settings]) % vocab
    while token in banned:
        token = (token + 1) % vocab
    return token


def forbidden(mask: np.ndarray, vocab: int) -> set[int]:
    """Tokens whose bits are not set."""
    return {token for token in range(vocab) if not int(mask[token // 32]) >> token % 32 & 1}


def logprob(tokens: Sequence[int], token: int) -> float:
    return float(np.float32(-(digest("logprob", list(tokens), int(token)) % 10_000) / 1000))


def top_tokens(tokens: Sequence[int], vocab: int, count: int) -> list[int]:
    start = digest("top", list(tokens)) % vocab
    return [(start + i) % vocab for i in range(count)]


def hidden(tokens: Sequence[int]) -> np.ndarray:
    """Hidden state at the last of these tokens: small whole numbers, which add up without rounding."""
    return np.array([digest("hidden", list(tokens), place) % 1000 - 500 for place in range(3)], np.float32)


def embedding(prompt: Sequence[int], pooling: str) -> np.ndarray:
    """What a request for an embedding gets."""
    states = [hidden(prompt[: place + 1]) for place in range(len(prompt))]
    found = np.sum(states if pooling == "mean" else states[-1:], axis=0, dtype=np.float64)
    return (found / np.linalg.norm(found)).astype(np.float32)


def settings_of(params: SamplingParams, prompt_len: int) -> list[float]:
    return [
        params.temperature,
        max(params.top_k, 0),
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        prompt_len,
    ]


def reference(
    prompt: Sequence[int],
    params: SamplingParams,
    key: Iterable[int],
    *,
    eos: Collection[int] = (),
    vocab: int = 40,
    max_length: int = 64,
    matcher: Matcher | None = None,
) -> tuple[list[int], str, int | None]:
    """Completion, finish reason and stop reason of one sequence that runs alone."""
    key, tokens, settings = list(key), list(prompt), settings_of(params, len(prompt))
    eos = set() if params.ignore_eos else set(eos)
    stops = eos | set(params.stop_token_ids)
    longest = min(max_length, len(prompt) + (params.max_tokens or max_length))
    while True:
        young = len(tokens) - len(prompt) < params.min_tokens
        banned = set(stops) if young else set()
        if matcher is not None:
            banned = forbidden(matcher.mask(sorted(banned)), vocab)
        token = sample(tokens, vocab, key, settings, banned)
        tokens.append(token)
        completion = tokens[len(prompt) :]
        if token in stops and not young:
            return completion, "stop", None if token in eos else token
        if matcher is not None:
            matcher.accept(token)
            if matcher.ended:
                return completion, "stop", None
        if len(tokens) >= longest:
            return completion, "length", None


class FakeExecutor:
    """Checks each plan against the limits and the rules of `StepPlan`, then runs it at once."""

    def __init__(self, limits: ExecutorLimits):
        self.limits = limits
        self.plans: list[StepPlan] = []
        self.closed = False
        self.fail_submit = self.fail_collect = False
        self._cache = np.full((limits.num_pages, limits.page_size, 2), UNWRITTEN, np.int64)  # token, position
        self._results: deque[StepResult] = deque()
        self._previous: tuple[StepPlan, StepResult] | None = None

    def submit(self, plan: StepPlan) -> None:
        if self.fail_submit:
            raise ConnectionError("the devices are gone")
        plan = StepPlan.from_bytes(plan.to_bytes())
        self._check(plan)
        result = self._run(plan)
        self.plans.append(plan)
        self._previous = plan, result
        self._results.append(result)

    def collect(self) -> StepResult:
        if self.fail_collect:
            raise ConnectionError("the devices are gone")
        return self._results.popleft()

    def close(self) -> None:
        self.closed = True

    def choose(self, context: list[int], key: Iterable[int], settings: list[float], banned: set[int]) -> int:
        return sample(context, self.limits.vocab_size, key, settings, banned)

    def _check(self, plan: StepPlan) -> None:
        limits = self.limits
        assert plan.step == len(self.plans), "a gap between steps"
        assert len(self._results) <= 1, "more than one step ahead"
        assert (plan.query_lens > 0).all()
        assert plan.query_lens.sum() == len(plan.token_ids) == len(plan.positions)
        assert (plan.query_lens[: plan.num_decodes] == 1).all()
        assert 0 < len(plan.query_lens) == len(plan.page_tables)
        assert plan.num_decodes <= limits.max_num_seqs
        assert plan.num_prefills <= limits.max_prefills
        assert plan.num_prefill_tokens <= limits.max_prefill_tokens
        assert len(plan.rows) <= (limits.max_rows if plan.num_prefills else limits.max_num_seqs)
        assert plan.page_tables.shape[1] <= limits.max_pages_per_seq
        assert plan.page_tables.min() >= 0
        assert plan.page_tables.max() < limits.num_pages
        needs_full = len(plan.bias) or plan.num_logprobs >= 0 or (plan.rows["target"] >= 0).any() or len(plan.mask)
        assert plan.full or not needs_full
        assert plan.mask.shape in ((0, 0), (len(plan.rows), -(-limits.vocab_size // 32)))
        starts = np.cumsum(plan.query_lens) - plan.query_lens
        assert (starts[plan.rows["seq"]] <= plan.rows["token"]).all()
        assert (plan.rows["token"] < (starts + plan.query_lens)[plan.rows["seq"]]).all()
        assert (plan.rows["position"] == plan.positions[plan.rows["token"]] + 1).all()
        owners = np.repeat(np.arange(len(plan.query_lens)), plan.query_lens)[plan.pools]
        assert (owners[:, 0] == owners[:, 1]).all(), "a pool over two sequences"
        assert (owners >= plan.num_decodes).all(), "a pool outside the prompts"
        assert len(set(owners[:, 0].tolist())) == len(plan.pools), "two pools of one sequence"

    def _resolve(self, plan: StepPlan) -> np.ndarray:
        tokens = plan.token_ids.astype(np.int64)
        for i in np.flatnonzero(tokens < 0):
            assert self._previous is not None, "a reference without a previous step"
            before, result = self._previous
            row = -int(tokens[i]) - 1
            assert before.step == plan.step - 1, "a stale reference"
            assert before.rows["target"][row] < 0, "a reference to a token that was not sampled"
            assert before.rows["position"][row] == plan.positions[i], "a reference to another sequence's token"
            tokens[i] = result.tokens[row]
        return tokens

    def _run(self, plan: StepPlan) -> StepResult:
        tokens = self._resolve(plan)
        size = self.limits.page_size
        views, writes, begin = [], {}, 0
        for table, length in zip(plan.page_tables, plan.query_lens, strict=True):
            positions = plan.positions[begin : begin + length]
            assert (np.diff(positions) == 1).all()
            # A sequence sees what earlier steps wrote and what it writes itself, nothing that others write now.
            view = self._cache[table].reshape(-1, 2).copy()
            for position, token in zip(positions, tokens[begin : begin + length], strict=True):
                page = int(table[position // size])
                assert page != 0, "a token was written to the scratch page"
                place = page, int(position) % size
                assert place not in writes, "two sequences write to one place"
                writes[place] = view[position] = token, position
            views.append(view)
            begin += int(length)
        for (page, offset), value in writes.items():
            self._cache[page, offset] = value
        sampled, logprobs, top = [], [], []
        count = max(plan.num_logprobs, 0)
        for number, row in enumerate(plan.rows):
            seen = views[row["seq"]][: row["position"]]
            assert (seen[:, 1] == np.arange(row["position"])).all(), "a token that was never written, or moved"
            context = seen[:, 0].tolist()
            settings = [row[name] for name in row.dtype.names[4:-1]]
            banned = {int(b["token"]) for b in plan.bias if b["row"] == number and b["value"] == -np.inf}
            if len(plan.mask):
                banned |= forbidden(plan.mask[number], self.limits.vocab_size)
            target = int(row["target"])
            chosen = target if target >= 0 else self.choose(context, row["key"], settings, banned)
            sampled.append(chosen)
            logprobs.append(logprob(context, chosen))
            top.append(top_tokens(context, self.limits.vocab_size, count))
        owners = np.repeat(np.arange(len(views)), plan.query_lens)
        pooled = np.zeros((len(plan.pools), 3), np.float32)
        for number, (first, last) in enumerate(plan.pools.tolist()):
            for token in range(first, last + 1):
                seen = views[owners[token]][: plan.positions[token] + 1]
                assert (seen[:, 1] == np.arange(len(seen))).all(), "a token that was never written, or moved"
                pooled[number] += hidden(seen[:, 0].tolist())
        if plan.num_logprobs < 0:
            return StepResult(plan.step, np.array(sampled, np.int32), pooled=pooled)
        best = np.array(top, np.int32).reshape(len(top), count)
        return StepResult(
            plan.step,
            np.array(sampled, np.int32),
            np.array(logprobs, np.float32),
            np.full(len(sampled), 7, np.int32),
            best,
            -best.astype(np.float32),
            pooled,
        )


class ScriptedExecutor(FakeExecutor):
    """Samples the tokens of a script, then its last one for ever, for each sequence, whatever the prompt."""

    def __init__(self, limits: ExecutorLimits, script: Sequence[int]):
        super().__init__(limits)
        self.script = list(script)

    def choose(self, context: list[int], key: Iterable[int], settings: list[float], banned: set[int]) -> int:
        return self.script[min(len(context) - int(settings[-1]), len(self.script) - 1)]
