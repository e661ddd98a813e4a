"""Drives an engine or a scheduler in tests."""

from itertools import count

import numpy as np
import tokenizers

from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.scheduler import Scheduler
from ryzanstein_jax.engine.sequence import Sequence
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.plan import StepPlan, StepResult
from ryzanstein_jax.request import RequestOutput, SamplingParams
from tests.engine.fake_executor import FakeExecutor, limits

LETTERS = "abcdefghijklmnopqrstuvwxyz"
EOS = 39

numbers = count()


def letter_tokenizer() -> Tokenizer:
    """Token 0 is "a", 1 is "b" and so on; 39 is the special "</s>"."""
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)}
    vocabulary |= {f"<{index}>": index for index in range(26, 39)} | {"</s>": EOS}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<26>"))
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, eos_token="</s>")


def sequence(prompt, *, priority=0, index=0, key=(1, 2), eos=(), **params) -> Sequence:
    params = SamplingParams(**{"max_tokens": 8, **params})
    order = (priority, next(numbers), index)
    return Sequence("r", list(prompt), params, key=key, index=index, order=order, eos_token_ids=eos)


def result(plan: StepPlan, token: int = 9) -> StepResult:
    tokens = np.where(plan.rows["target"] >= 0, plan.rows["target"], token).astype(np.int32)
    return StepResult(plan.step, tokens)


def run(scheduler: Scheduler, token: int = 9) -> StepPlan | None:
    """One step, committed at once."""
    plan = scheduler.schedule()
    if plan is not None:
        scheduler.commit(result(plan, token))
    scheduler.check()
    return plan


def finish_scheduled(scheduler: Scheduler, token: int = 9) -> int:
    steps = 0
    while scheduler.has_unfinished:
        assert run(scheduler, token) is not None
        steps += 1
    return steps


def shape(plan: StepPlan) -> tuple[int, list[int]]:
    return plan.num_decodes, plan.query_lens.tolist()


def engine(executor=None, *, tokenizer=None, eos=(EOS,), **config) -> Engine:
    return Engine(
        executor or FakeExecutor(limits()),
        tokenizer=tokenizer,
        eos_token_ids=eos,
        config=EngineConfig(**{"model": "none", **config}),
    )


def finish_all(engine: Engine) -> dict[str, RequestOutput]:
    outputs = {}
    for _ in range(500):
        if not engine.has_unfinished():
            return outputs
        for output in engine.step():
            outputs[output.request_id] = output
    raise AssertionError(f"does not end: {engine.stats()}")
