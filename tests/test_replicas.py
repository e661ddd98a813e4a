"""Replicas on executors without devices: requests spread, move when one dies, and none is lost or changed."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import pytest

from ryzanstein_jax.engine.executor import ExecutorLimits
from ryzanstein_jax.engine.sequence import sampling_key
from ryzanstein_jax.errors import EngineClosedError, PoisonRequestError, RequestError
from ryzanstein_jax.metrics import Metrics
from ryzanstein_jax.replicas import Replicas, Ticket
from ryzanstein_jax.request import PoolingParams, SamplingParams
from ryzanstein_jax.structured_outputs import StructuredOutputsParams
from tests.engine.drive import EOS, engine, letter_tokenizer
from tests.engine.fake_executor import embedding, limits, reference
from tests.engine.restarting import Poisoned
from tests.server.serving import wait_until

MACHINE = dict(max_num_seqs=8, max_rows=16, num_pages=129, max_prefills=4)


class Replaced(Poisoned):
    """Loses its devices at some calls, or when `breaks` says so; new ones are there while `back` is set.

    Args:
        looks: how often they are looked for in vain, each time, although it is.
    """

    def __init__(
        self,
        deaths: Collection[int] = (),
        breaks: Callable[[list[int]], bool] = lambda seen: False,
        machine: ExecutorLimits | None = None,
        looks: int = 0,
        **more: Any,
    ):
        super().__init__(breaks, machine or limits(**MACHINE), deaths=deaths, **more)
        self.looks = self.looks_left = looks
        self.metrics, self.back, self.gate = Metrics(), threading.Event(), threading.Event()
        self.gate.set()

    def usage(self) -> list[Any]:
        return []

    @property
    def is_serving(self) -> bool:
        if not self.dead:
            self.looks_left = self.looks
        elif self.back.is_set():
            self.looks_left -= 1
        return not self.dead or (self.back.is_set() and self.looks_left < 0)

    def await_verdict(self, timeout: float) -> None:
        assert self.dead and timeout > 0

    def collect(self):
        assert self.gate.wait(10)
        return super().collect()

    def restart(self, timeout: float, num_requests: int) -> bool:
        assert self.back.is_set(), "nobody asks before there is something to ask for, unless all hope is gone"
        return super().restart(timeout, num_requests)


class Crowd:
    """Requests on replicas, and what each must become."""

    def __init__(self, *executors: Replaced, tokenizer: Any = None, **config: Any):
        numbers = itertools.count()
        parts = [(one, engine(one, tokenizer=tokenizer, eos=(EOS,), **config)) for one in executors]
        for _, made in parts:
            made._numbers = numbers
        self.replicas = Replicas(parts, executors[0].limits.page_size)  # type: ignore[arg-type]
        self.asked: dict[str, tuple[list[int], Any]] = {}
        self.tickets: dict[str, Ticket] = {}
        self.chunks: dict[str, queue.SimpleQueue[Any]] = {}

    def add(self, name: str, prompt: list[int], **params: Any) -> Ticket:
        wanted: Any = SamplingParams(**{"max_tokens": 20, "seed": len(self.asked), "logprobs": 1, **params})
        return self.submit(name, prompt, wanted)

    def submit(self, name: str, prompt: list[int], params: Any) -> Ticket:
        chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        ticket = Ticket(name, chunks.put, params.n, self.replicas.keys(prompt))
        self.asked[name], self.tickets[name], self.chunks[name] = (prompt, params), ticket, chunks
        self.replicas.submit(ticket, lambda one: one.add(name, prompt, params))
        return ticket

    def output(self, name: str) -> Any:
        """Of a request that ended well; its chunks add up to it."""
        seen: dict[int, list[int]] = {}
        output = None
        while (item := self.chunks[name].get(timeout=20)) is not None:
            if isinstance(item, Exception):
                raise item
            seen.setdefault(item.index, []).extend(item.token_ids)
            output = item.output
        assert output is not None and output.finished
        assert [seen[one.index] for one in output.outputs] == [one.token_ids for one in output.outputs]
        return output

    def verify(self, *names: str) -> None:
        """Requests ended with the tokens and log-probabilities that they get alone, undisturbed."""
        for name in names or self.asked:
            prompt, params = self.asked[name]
            for one in self.output(name).outputs:
                key = sampling_key(params.seed, one.index)
                assert (one.token_ids, one.finish_reason) == reference(prompt, params, key, eos=(EOS,))[:2], name
                assert [next(iter(entry)) for entry in one.logprobs or []] == one.token_ids

    def spread(self) -> list[int]:
        """How many requests each replica has."""
        return [sum(ticket.replica is one for ticket in self.tickets.values()) for one in self.replicas.all]

    def close(self) -> None:
        wait_until(lambda: self.replicas.router.loads == [0] * len(self.replicas.all))
        wait_until(lambda: all(not one.engine.has_unfinished() for one in self.replicas.all))
        for one in self.replicas.all:
            assert one.stats().num_pages_used == 0 and not one._tickets
            one.engine._scheduler.check()
        self.replicas.close()

    @property
    def moved(self) -> list[int]:
        return [one.metrics.counter("requests_moved") for one in self.replicas.all]


def prompt_of(number: int) -> list[int]:
    return [(7 * number + 3 * place) % 39 for place in range(3 + number)]


def fill(crowd: Crowd, count: int = 8) -> None:
    kinds: list[dict[str, Any]] = [dict(), dict(n=2, temperature=0.7), dict(temperature=0), dict(prompt_logprobs=1)]
    for number in range(count):
        crowd.add(f"request {number}", prompt_of(number), **kinds[number % len(kinds)])


def test_requests_spread_and_are_those_of_one_engine():
    crowd = Crowd(Replaced(), Replaced(), Replaced())
    fill(crowd, 9)
    assert crowd.spread() == [3, 3, 3] or sorted(crowd.spread()) == [2, 3, 4], "by sequences: some have two"
    crowd.verify()
    assert all(one.num_steps for one in [replica.executor for replica in crowd.replicas.all])  # type: ignore[attr-defined]
    crowd.close()


@pytest.mark.parametrize("death", [0, 1, 2, 5, 12, 31])
def test_requests_of_one_that_dies_go_on_elsewhere(death: int):
    """It never comes back: nobody waits for it, and new requests go to the others."""
    crowd = Crowd(Replaced({death}), Replaced())
    fill(crowd)
    crowd.verify()
    assert crowd.moved[0] > 0 and crowd.moved[1] == 0
    before = crowd.spread()  # some may have ended before
    assert before[0] < 3 and (death > 20 or not before[0])
    crowd.add("late", [1, 2, 3])
    crowd.verify("late")
    assert crowd.spread() == [before[0], before[1] + 1]
    assert not crowd.replicas.all[0].executor.replayed, "it was not waited for"  # type: ignore[attr-defined]
    pause = crowd.replicas.all[1].metrics.snapshot()["histograms"]["move_seconds"]
    assert pause["count"] == crowd.moved[0]
    crowd.close()


def test_one_that_has_new_devices_takes_requests_again():
    first = Replaced({4})
    crowd = Crowd(first, Replaced())
    fill(crowd)
    crowd.verify()
    first.back.set()
    wait_until(lambda: crowd.replicas.all[0].is_up)
    assert first.replayed == [0], "what moved is not replayed there"
    steps = first.num_steps
    for number in range(4):
        crowd.add(f"later {number}", prompt_of(number))
    crowd.verify(*(f"later {number}" for number in range(4)))
    assert first.num_steps > steps
    crowd.close()


def test_devices_that_were_replaced_while_nothing_ran_move_nobody():
    first = Replaced()
    crowd = Crowd(first, Replaced())
    first.die()
    first.back.set()
    for number in range(4):
        crowd.add(f"request {number}", prompt_of(number))
    crowd.verify()
    assert crowd.moved == [0, 0] and len(first.replayed) == 1
    crowd.close()


def test_where_all_are_down_requests_wait_for_the_first_that_comes_back():
    first, second = Replaced({3}), Replaced({9})
    crowd = Crowd(first, second)
    fill(crowd)
    wait_until(lambda: first.dead and second.dead)
    crowd.add("new", [5, 6, 7])
    time.sleep(0.1)
    assert all(one.engine.is_lost for one in crowd.replicas.all)
    second.back.set()
    crowd.verify()
    assert crowd.spread() == [0, 9] and not first.replayed
    first.back.set()
    crowd.close()


def test_each_dies_in_turn_again_and_again():
    executors = [Replaced(range(number, 200, 17)) for number in (3, 8, 14)]
    for one in executors:
        one.back.set()
    crowd = Crowd(*executors)
    fill(crowd, 16)
    crowd.verify()
    assert sum(one.num_deaths for one in executors) > 6
    crowd.close()


@pytest.mark.parametrize("looks", [0, 8])
def test_a_request_that_kills_ends_alone_wherever_it_goes(looks: int):
    poison = [13, 13, 13]
    executors = [
        Replaced(breaks=lambda seen: seen[:3] == poison[: len(seen)] and len(seen) > 5, looks=looks) for _ in range(3)
    ]
    for one in executors:
        one.back.set()
    crowd = Crowd(*executors)
    fill(crowd)
    crowd.add("poison", [*poison, 1, 2, 3, 4], n=2)
    with pytest.raises(PoisonRequestError, match="poison"):
        crowd.output("poison")
    crowd.verify(*(name for name in crowd.asked if name != "poison"))
    assert sum(one.num_deaths for one in executors) == 4
    assert (sum(crowd.moved) > 0) == (looks > 0)
    crowd.close()


def test_who_leaves_is_ended_wherever_the_request_is():
    """Before, during and after a move: no page stays taken, and nothing of it is delivered any more."""
    first, second = Replaced(), Replaced()
    crowd = Crowd(first, second)
    for gate in (first.gate, second.gate):
        gate.clear()
    fill(crowd)
    wait_until(lambda: first.num_steps and second.num_steps)
    gone = [name for name, ticket in crowd.tickets.items() if ticket.replica is crowd.replicas.all[0]]
    crowd.replicas.forget(crowd.tickets[gone[0]])
    first.die()
    first.gate.set()
    wait_until(lambda: crowd.spread()[0] == 1)  # the others are on their way, to a replica that does not look yet
    for name in gone[1:]:
        crowd.replicas.forget(crowd.tickets[name])
    second.gate.set()
    crowd.verify(*(name for name in crowd.asked if name not in gone))
    assert all(crowd.chunks[name].empty() for name in gone)
    first.back.set()
    crowd.close()


def test_who_leaves_just_when_the_request_moves_leaves_nothing_behind():
    """The word that the caller has gone overtakes the request on its way."""
    first, second = Replaced({6}), Replaced()
    crowd = Crowd(first, second)
    target, moved = crowd.replicas.all[1], []
    send = target.send

    def overtake(what: Any) -> None:
        if what.func == target.take_over:
            moved.append(what.args[0])
            crowd.replicas.forget(what.args[0])
        send(what)

    target.send = overtake  # type: ignore[method-assign]
    fill(crowd)
    wait_until(lambda: moved)
    wait_until(lambda: crowd.replicas.router.loads[0] == 0)
    crowd.verify(*(name for name, ticket in crowd.tickets.items() if ticket not in moved))
    steps = second.num_steps
    crowd.close()
    assert second.num_steps - steps <= 2, "nothing of it runs on unseen"


@pytest.mark.parametrize("death", [10, 40])
def test_a_move_to_less_room_ends_with_what_there_is(death: int):
    crowd = Crowd(Replaced({death}), Replaced(machine=limits(**{**MACHINE, "max_model_len": 24})))
    crowd.add("long", [3] * 12, max_tokens=40, ignore_eos=True)
    (one,) = crowd.output("long").outputs
    prompt, params = crowd.asked["long"]
    whole = reference(prompt, params, sampling_key(params.seed))[0]
    assert one.finish_reason == "length" and one.token_ids == whole[: len(one.token_ids)]
    assert crowd.moved == [1, 0] and (len(one.token_ids) == 12 if death == 10 else 12 < len(one.token_ids) < 40)
    crowd.close()


def test_grammars_and_embeddings_move_too():
    first = Replaced({3})
    crowd = Crowd(first, Replaced(), tokenizer=letter_tokenizer())
    wanted = StructuredOutputsParams(regex="(ab|cd){6}")
    names = [f"form {number}" for number in range(6)]
    for name in names:
        crowd.add(name, [1, 2, 3], structured_outputs=wanted, logprobs=None)
    for number in range(6):
        pooling = "mean" if number % 2 else "last"
        crowd.submit(f"embedding {number}", prompt_of(20 + number), PoolingParams(pooling=pooling))
    for name in names:
        (one,) = crowd.output(name).outputs
        assert len(one.text) == 12 and {one.text[i : i + 2] for i in range(0, 12, 2)} <= {"ab", "cd"}
        assert one.finish_reason == "stop"
    for number in range(6):
        prompt, params = crowd.asked[f"embedding {number}"]
        chunks = crowd.chunks[f"embedding {number}"]
        assert chunks.get(timeout=20).output.embedding.tolist() == embedding(prompt, params.pooling).tolist()
    assert crowd.moved[0] > 0
    crowd.close()


def test_an_invalid_request_is_refused_and_counts_nowhere():
    crowd = Crowd(Replaced(), Replaced())
    crowd.submit("wrong", [1, 2, 99], SamplingParams())
    with pytest.raises(RequestError, match="vocabulary"):
        crowd.output("wrong")
    crowd.close()


def test_a_closed_one_tells_everybody():
    crowd = Crowd(Replaced({2}), Replaced({2}))
    fill(crowd)
    wait_until(lambda: all(one.engine.is_lost for one in crowd.replicas.all))
    crowd.replicas.close()
    for name in crowd.asked:
        with pytest.raises(EngineClosedError):
            crowd.output(name)
    assert crowd.replicas.router.loads == [0, 0]
    with pytest.raises(EngineClosedError):
        crowd.add("late", [1])
    assert crowd.replicas.router.loads == [0, 0]
