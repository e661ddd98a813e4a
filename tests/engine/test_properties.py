"""Whatever is added, aborted, preempted or lost meanwhile, each request gets the tokens it gets alone."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.sequence import sampling_key
from ryzanstein_jax.errors import RequestError
from ryzanstein_jax.request import PoolingParams, RequestOutput, SamplingParams
from tests.engine.fake_executor import FakeExecutor, embedding, limits, logprob, reference

EOS = (3,)
VOCAB = 12
#: Prompts share beginnings, so that the prefix cache finds something.
STEM = [5, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]

prompts = st.builds(
    lambda shared, own: STEM[:shared] + own,
    st.integers(0, len(STEM)),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
)
params = st.builds(
    lambda n, max_tokens, few, seed, ignore_eos, stops, logprobs, scored, penalty: SamplingParams(
        n=n,
        max_tokens=max_tokens,
        min_tokens=min(few, max_tokens or few),
        seed=seed,
        ignore_eos=ignore_eos,
        stop_token_ids=stops,
        logprobs=logprobs,
        prompt_logprobs=scored,
        presence_penalty=penalty,
    ),
    st.sampled_from([1, 1, 1, 2, 3]),
    st.sampled_from([None, 1, 2, 3, 9, 20]),
    st.sampled_from([0, 0, 0, 1, 4]),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([(), (), (7,), (7, 8)]),
    st.sampled_from([None, None, 0, 2]),
    st.sampled_from([None, None, None, 0, 1]),
    st.sampled_from([0.0, 0.0, 0.5]),
)
poolings = st.sampled_from([PoolingParams(pooling="last"), PoolingParams(pooling="mean")])
machines = st.builds(
    lambda pages, size, seqs, tokens, prefills, rows: limits(
        num_pages=pages,
        page_size=size,
        max_model_len=32,
        max_num_seqs=seqs,
        max_prefill_tokens=tokens,
        max_prefills=prefills,
        max_rows=rows,
        vocab_size=VOCAB,
    ),
    st.integers(4, 40),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 5),
    st.integers(1, 24),
    st.integers(1, 3),
    st.integers(1, 9),
)
actions = st.one_of(
    st.tuples(st.just("add"), prompts, params, st.integers(0, 2)),
    st.tuples(st.just("add"), prompts, params, st.integers(0, 2)),
    st.tuples(st.just("add"), prompts, poolings, st.integers(0, 2)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("recover"), st.integers(0, 3), st.sampled_from([1, 2, 4])),
)


class Run:
    """An engine, and what is expected of it."""

    def __init__(self, machine, caching: bool):
        self.machine = machine
        self.engine = Engine(
            FakeExecutor(machine),
            eos_token_ids=EOS,
            config=EngineConfig(model="none", enable_prefix_caching=caching),
        )
        self.asked: dict[str, tuple[list[int], SamplingParams | PoolingParams]] = {}
        self.aborted: set[str] = set()
        self.finished: dict[str, RequestOutput] = {}
        self.max_length = self.engine._scheduler.max_length

    def add(self, prompt: list[int], params: SamplingParams | PoolingParams, priority: int) -> None:
        name = f"request {len(self.asked)}"
        try:
            self.engine.add(name, prompt, params, priority=priority)
        except RequestError:
            assert len(prompt) >= self.max_length
        else:
            assert len(prompt) < self.max_length
            self.asked[name] = prompt, params

    def step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                assert output.request_id not in self.finished, "a request ended twice"
                self.finished[output.request_id] = output
        self.engine._scheduler.check()

    def abort(self, number: int) -> None:
        name = f"request {number}"
        if self.engine.abort(name):
            self.aborted.add(name)

    def recover(self, page_size: int) -> None:
        """Onto a cache of the same capacity, perhaps in other pages."""
        capacity = (self.machine.num_pages - 1) * self.machine.page_size
        if capacity % page_size == 0:
            num_pages = 1 + capacity // page_size
            self.machine = dataclasses.replace(self.machine, num_pages=num_pages, page_size=page_size)
        self.engine.recover(FakeExecutor(self.machine))

    def verify(self) -> None:
        assert self.finished.keys() == self.asked.keys()
        for name, (prompt, params) in self.asked.items():
            output = self.finished[name]
            assert output.error is None
            if isinstance(params, PoolingParams):
                self.verify_embedding(name, prompt, params.pooling)
                continue
            for completion in output.outputs:
                key = sampling_key(params.seed, completion.index)
                tokens, reason, stop = reference(prompt, params, key, eos=EOS, vocab=VOCAB, max_length=self.max_length)
                if completion.finish_reason == "abort":
                    assert name in self.aborted
                    assert completion.token_ids == tokens[: len(completion.token_ids)]
                else:
                    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == (
                        tokens,
                        reason,
                        stop,
                    )
                if params.logprobs is not None:
                    context = list(prompt)
                    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
                        assert entry[token].logprob == logprob(context, token)
                        context.append(token)
            scored = output.prompt_logprobs
            assert (scored is None) == (params.prompt_logprobs is None)
            if scored is not None:
                assert len(scored) == len(prompt) or name in self.aborted
                for position, entry in enumerate(scored[1:], start=1):
                    token = prompt[position]
                    assert entry[token].logprob == logprob(prompt[:position], token)
        stats = self.engine.stats()
        assert stats.num_pages_used == stats.num_running == stats.num_waiting == 0

    def verify_embedding(self, name: str, prompt: list[int], pooling: str) -> None:
        (completion,), found = self.finished[name].outputs, self.finished[name].embedding
        assert completion.token_ids == [] and completion.text == ""
        if completion.finish_reason == "abort":
            assert name in self.aborted
        else:
            assert completion.finish_reason == "stop"
            np.testing.assert_array_equal(found, embedding(prompt, pooling))
            assert pooling == "last" or self.finished[name].num_cached_tokens == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(machines, st.booleans(), st.lists(actions, min_size=2, max_size=25))
def test_every_request_gets_its_own_tokens_whatever_else_happens(machine, caching, script):
    run = Run(machine, caching)
    for action, *arguments in script:
        if action == "add":
            run.add(*arguments)
        elif action == "step":
            for _ in range(arguments[0]):
                run.step()
        elif action == "abort":
            run.abort(*arguments)
        elif arguments[0] == 0:  # losing the device is rare
            run.recover(arguments[1])
    steps = 0
    while run.engine.has_unfinished():
        run.step()
        steps += 1
        assert steps < 20_000, run.engine.stats()
    run.verify()
