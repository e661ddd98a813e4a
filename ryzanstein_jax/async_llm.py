"""`AsyncLLM`: the same engine for asyncio. One thread steps it; coroutines wait for their own chunks."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.report import RankUsage, SchedulerStats, SetupReport
from ryzanstein_jax.engine.sequence import drawn_seed
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import EngineClosedError
from ryzanstein_jax.fleet import Fleet
from ryzanstein_jax.llm import Messages, Prompt, default_sampling_params, encode_input
from ryzanstein_jax.replicas import Replica, Replicas, Ticket
from ryzanstein_jax.request import PoolingParams, RequestOutput, SamplingParams
from ryzanstein_jax.start import make_config, start_engines
from ryzanstein_jax.streams import StreamChunk

if TYPE_CHECKING:
    from ryzanstein_jax.metrics import Metrics
    from ryzanstein_jax.orchestrator.orchestrator import MultiGPUOrchestrator


class _Listener:
    """Brings one request's chunks from the engine's thread to its event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.chunks: asyncio.Queue[StreamChunk | Exception | None] = asyncio.Queue()

    def put(self, item: StreamChunk | Exception | None) -> None:
        """Hands over a chunk, an error, or None for the end; a loop that is gone wants none."""
        try:
            self.loop.call_soon_threadsafe(self.chunks.put_nowait, item)
        except RuntimeError:
            pass  # the loop was closed while its request ran


class AsyncLLM:
    """A model for asyncio programs, such as servers and notebooks.

    Use it as an async context manager, or call `close`. Made outside of any event loop or inside of one; several
    loops may use it at a time.

    Args:
        model: Hugging Face id, folder, `.gguf` file, snapshot, or "smollm2" for the default model.
        progress: show bars while it starts, and the memory sum.
        executor, orchestrator: as `LLM` takes them.
        settings: the other fields of `EngineConfig`. With `data_parallel_size` over 1, as many engines share the
            requests, each on worker processes of its own, and take over those of one that loses its devices.

    Raises:
        ConfigError, UnsupportedModelError, WeightsError, MemoryBudgetError: before anything is held.
    """

    def __init__(
        self,
        model: str = "smollm2",
        *,
        progress: bool = True,
        executor: str = "local",
        orchestrator: OrchestratorConfig | Mapping[str, Any] | None = None,
        **settings: Any,
    ):
        self.config = make_config(model, settings)
        self._opened, parts = start_engines(self.config, progress, executor, orchestrator)
        self._replicas = Replicas(parts, self.config.page_size)
        self._ids, self._seeds = itertools.count(), itertools.count()

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._opened.tokenizer

    @property
    def replicas(self) -> Sequence[Replica]:
        """The engines, as many as `data_parallel_size`; each has metrics, a report and an orchestrator of its own."""
        return self._replicas.all

    @property
    def orchestrator(self) -> MultiGPUOrchestrator | Fleet | None:
        """What watches the worker processes; None where the devices are in this process."""
        first = self.replicas[0].orchestrator
        return first if len(self.replicas) == 1 or first is None else Fleet(self.replicas)

    @property
    def metrics(self) -> Metrics:
        """Counters and histograms of the engine; of several replicas, those of the first."""
        return self.replicas[0].metrics

    @property
    def report(self) -> SetupReport:
        """What the last start of the devices cost, and how their memory is divided; of the first replica."""
        return self.replicas[0].report

    @property
    def is_alive(self) -> bool:
        """Whether an engine's thread runs: false after `close`, and after the engine failed."""
        return any(replica.is_alive for replica in self.replicas)

    @property
    def max_length(self) -> int:
        """Most tokens that a prompt and its completion may have together."""
        return min(replica.engine.max_length for replica in self.replicas)

    def stats(self) -> SchedulerStats:
        """Where the scheduler stands. Read while it works: numbers of one call may be a step apart."""
        return SchedulerStats.total([replica.stats() for replica in self.replicas])

    def usage(self) -> list[RankUsage]:
        """Memory and communication of each rank, or of each device of this process; replica by replica."""
        return [rank for replica in self.replicas for rank in replica.usage()]

    def cpu_seconds(self) -> float:
        """Processor time of the threads that schedule, and hand steps to the devices; 0 once they have ended."""
        return sum(replica.cpu_seconds() for replica in self.replicas)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's `generation_config.json` recommends."""
        return default_sampling_params(self._opened)

    def compile_grammar(self, params: SamplingParams) -> None:
        """Compiles the grammar that the parameters ask for, which is then kept; may take a second.

        Raises:
            RequestError: it can't be compiled.
        """
        self._compiler.compile_grammar(params)

    def get_pooling_params(self, dimensions: int | None = None) -> PoolingParams:
        """How embeddings are made: as the setting `embedding_pooling` says, or else the model's folder.

        Raises:
            RequestError: the folder asks for what is not there, or embeddings have fewer dimensions.
        """
        return self._opened.pooling_params(self.config.embedding_pooling, dimensions)

    async def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | PoolingParams | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[StreamChunk]:
        """Completes one prompt, or answers one conversation, piece by piece.

        With `PoolingParams` there is one chunk, whose output holds the embedding.

        Closing the iterator, or cancelling its task, aborts the request.

        Raises:
            RequestError: the prompt or the parameters are invalid.
            EngineClosedError: the engine was closed, or failed, before the request ended.
        """
        params = sampling_params or self.get_default_sampling_params()
        # Tokenizing and templates take their time: not on the event loop.
        text, ids, keys = await asyncio.to_thread(self._encode, prompt)
        grammar = None
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            grammar = await asyncio.to_thread(self._compiler.compile_grammar, params)
        if isinstance(params, SamplingParams) and params.seed is None and len(self.replicas) > 1:
            # As one engine would draw it, whichever replica the request goes to.
            params = dataclasses.replace(params, seed=drawn_seed(self.config.seed, next(self._seeds)))
        listener = _Listener()
        ticket = Ticket(str(next(self._ids)), listener.put, params.n, keys)

        def begin(engine: Engine) -> None:
            engine.add(ticket.request_id, ids, params, prompt=text, priority=priority, grammar=grammar)

        self._replicas.submit(ticket, begin)
        try:
            while (item := await listener.chunks.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._replicas.forget(ticket)

    async def embed(
        self, prompt: Prompt, pooling_params: PoolingParams | None = None, *, priority: int = 0
    ) -> RequestOutput:
        """Embeds one prompt: `embedding` of the output is float32 [hidden], of length 1; raises as `stream` does."""
        return await self._last(self.stream(prompt, pooling_params or self.get_pooling_params(), priority=priority))

    async def generate(
        self, prompt: Prompt | Messages, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> RequestOutput:
        """The whole output of one prompt or conversation; raises as `stream` does."""
        return await self._last(self.stream(prompt, sampling_params, priority=priority))

    async def _last(self, stream: AsyncIterator[StreamChunk]) -> RequestOutput:
        output: RequestOutput | None = None
        async for chunk in stream:
            output = chunk.output
        if output is None:
            raise EngineClosedError("the request ended without an answer")
        return output

    def close(self) -> None:
        """Ends what is under way with a typed error, and frees the devices. May be called again."""
        self._replicas.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # --- within

    @property
    def _compiler(self) -> Engine:
        """Whose compiled grammars all replicas use."""
        return self.replicas[0].engine

    def _encode(self, prompt: Prompt | Messages) -> tuple[str | None, list[int], list[bytes]]:
        text, ids = encode_input(prompt, self.tokenizer)
        return text, ids, self._replicas.keys(ids) if self.config.enable_prefix_caching else []
