"""`LLM`: a model in this process, for scripts and notebooks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeGuard, cast

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.engine.open import OpenModel
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import ConfigError, EngineClosedError, RequestError
from ryzanstein_jax.progress import progress_bars
from ryzanstein_jax.request import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingParams,
    RequestOutput,
    SamplingParams,
)
from ryzanstein_jax.start import as_orchestrator, make_config, start_engines
from ryzanstein_jax.streams import StreamChunk, StreamCursor

if TYPE_CHECKING:
    from ryzanstein_jax.communication import Collective
    from ryzanstein_jax.metrics import Metrics
    from ryzanstein_jax.orchestrator.orchestrator import MultiGPUOrchestrator

#: A prompt: text, token ids, or a mapping with "prompt" or "prompt_token_ids" as in vLLM.
Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model, its devices and its engine.

    Use it as a context manager, or call `close`. Safe to call from several threads; they take turns.

    Args:
        model: Hugging Face id, folder, `.gguf` file, snapshot, or "smollm2" for the default model.
        progress: show bars while it starts, and the memory sum.
        executor: "local" keeps the devices in this process; "processes" gives each a worker process, and replaces
            those that die while every request goes on.
        orchestrator: how worker processes are watched and replaced: an `OrchestratorConfig`, or its fields.
        settings: the other fields of `EngineConfig`.

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
        self.config, self._progress = make_config(model, settings), progress
        if self.config.data_parallel_size > 1:
            remedy = "LLM has one replica: use AsyncLLM, or `ryzanstein serve` or `batch`"
            raise ConfigError("data_parallel_size", self.config.data_parallel_size, remedy)
        self._opened, ((self._executor, self._engine),) = start_engines(self.config, progress, executor, orchestrator)
        self.report = self._executor.report
        self._lock = threading.RLock()
        self._outputs: dict[str, RequestOutput] = {}
        self._ids = itertools.count()

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._opened.tokenizer

    @property
    def num_devices(self) -> int:
        return self.config.tensor_parallel_size

    @property
    def metrics(self) -> Metrics:
        """Counters and histograms of the engine."""
        return self._executor.metrics

    @property
    def orchestrator(self) -> MultiGPUOrchestrator | None:
        """What watches the worker processes; None where the devices are in this process."""
        return as_orchestrator(self._executor)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's `generation_config.json` recommends."""
        return default_sampling_params(self._opened)

    def collectives(self) -> dict[str, list[Collective]]:
        """What each compiled program communicates: kind, bytes, group and count, by program."""
        return self._executor.collectives()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, in one continuous batch.

        Args:
            prompts: one prompt or a list of them.
            sampling_params: for all prompts, or one for each; None takes the model's own defaults.
            use_tqdm: show a progress bar; None as `progress` says. The name is vLLM's.

        Returns:
            One output per prompt, in order.

        Raises:
            RequestError: a prompt or its parameters are invalid; then none of them is run.
        """
        batch = as_batch(prompts)
        each = self._params_of(sampling_params, len(batch))
        encoded = map(self._encode, batch)
        return self._run([(*prompt, params) for prompt, params in zip(encoded, each, strict=True)], use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of several, through the model's chat template.

        Raises:
            RequestError: the model has no chat template, the template refuses the messages, or as `generate`.
        """
        conversations: list[Messages] = (
            [messages] if _is_conversation(messages) else list(cast(Sequence[Messages], messages))
        )
        each = self._params_of(sampling_params, len(conversations))
        requests = []
        for conversation, params in zip(conversations, each, strict=True):
            ids = self._need_tokenizer().encode_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                variables=chat_template_kwargs,
            )
            requests.append((None, ids, params))
        return self._run(requests, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Embeds prompts: each as one vector of length 1, of the final hidden states.

        Args:
            prompts: one prompt or a list of them.
            pooling_params: None takes the setting `embedding_pooling`, or else what the model's folder says.
            use_tqdm: show a progress bar; None as `progress` says. The name is vLLM's.

        Returns:
            One output per prompt, in order; `output.outputs.embedding` is float32 [hidden].

        Raises:
            RequestError: a prompt or the parameters are invalid; then none of them is run.
        """
        if pooling_params is None:
            params = self._opened.pooling_params(self.config.embedding_pooling)
        else:
            params = self._opened.pooling_params(pooling_params.pooling, pooling_params.dimensions)
        requests = [(*self._encode(prompt), params) for prompt in as_batch(prompts)]
        found = []
        for output in self._run(requests, use_tqdm):
            assert output.embedding is not None
            found.append(
                EmbeddingRequestOutput(
                    output.request_id, output.prompt, output.prompt_token_ids, EmbeddingOutput(output.embedding),
                    output.num_cached_tokens,
                )
            )  # fmt: skip
        return found

    def stream(self, prompt: Prompt | Messages, sampling_params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Completes one prompt, or answers one conversation, piece by piece.

        Closing the iterator aborts the request.
        """
        text, ids = encode_input(prompt, self.tokenizer)
        (params,) = self._params_of(sampling_params, 1)
        request_id = self._add(text, ids, params)
        return self._stream(request_id)

    def abort_all(self) -> None:
        """Ends every request that is under way with finish reason "abort"."""
        with self._lock:
            for request_id in list(self._outputs):
                self._engine.abort(request_id)

    def close(self) -> None:
        """Ends what is under way and frees the devices. May be called again."""
        with self._lock:
            self._engine.close()
            self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- within

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("prompt", "text", "the model brings no tokenizer: give token ids, or set tokenizer=")
        return self.tokenizer

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        return encode_prompt(prompt, self.tokenizer)

    def _params_of(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        each = [given] * count if isinstance(given, SamplingParams) else list(given)
        if len(each) != count:
            raise RequestError("sampling_params", len(each), f"give one, or one for each of the {count} prompts")
        return each

    def _add(self, text: str | None, ids: list[int], params: SamplingParams | PoolingParams) -> str:
        with self._lock:
            request_id = str(next(self._ids))
            self._engine.add(request_id, ids, params, prompt=text)
            return request_id

    def _step(self) -> None:
        for output in self._engine.step():
            self._outputs[output.request_id] = output

    def _run(
        self, requests: Sequence[tuple[str | None, list[int], SamplingParams | PoolingParams]], use_tqdm: bool | None
    ) -> list[RequestOutput]:
        shown = self._progress if use_tqdm is None else use_tqdm
        with self._lock, progress_bars(shown and len(requests) > 1) as bars:
            ids: list[str] = []
            try:
                for request in requests:
                    ids.append(self._add(*request))
                waiting = set(ids)
                while waiting:
                    bars("requests", len(ids) - len(waiting), len(ids))
                    self._step()
                    waiting = {i for i in waiting if i not in self._outputs or not self._outputs[i].finished}
            except BaseException:
                for request_id in ids:
                    self._engine.abort(request_id)
                raise
            results = [self._outputs.pop(request_id) for request_id in ids]
        for result in results:
            if result.error is not None:
                raise result.error
        return results

    def _stream(self, request_id: str) -> Iterator[StreamChunk]:
        cursor = StreamCursor()
        try:
            while True:
                with self._lock:
                    output = self._outputs.get(request_id)
                    chunks = cursor.advance(output) if output is not None else []
                    finished = output is not None and output.finished
                    if not chunks and not finished:
                        self._step()
                        continue
                yield from chunks
                if finished:
                    assert output is not None
                    if output.error is not None:
                        raise output.error
                    return
        finally:
            with self._lock:
                try:
                    self._engine.abort(request_id)
                except EngineClosedError:
                    pass  # it ended with the engine
                self._outputs.pop(request_id, None)


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several -> a list of prompts."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, list[int]]:
    """Text (where there is one) and token ids of a prompt.

    Raises:
        RequestError: it is neither text nor token ids, or text where there is no tokenizer.
    """
    text: object = prompt
    ids: object = None
    if isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    elif not isinstance(prompt, str):
        text, ids = None, prompt
    if isinstance(ids, Sequence) and not isinstance(ids, str | bytes):
        return text if isinstance(text, str) else None, list(ids)
    if not isinstance(text, str):
        raise RequestError("prompt", prompt, "use text, a list of token ids, or a mapping with either")
    if tokenizer is None:
        raise RequestError("prompt", prompt, "the model brings no tokenizer: give token ids, or set tokenizer=")
    return text, tokenizer.encode(text)


def encode_input(prompt: Prompt | Messages, tokenizer: Tokenizer | None) -> tuple[str | None, list[int]]:
    """`encode_prompt` of a prompt, or the chat template of a conversation."""
    if not _is_conversation(prompt):
        return encode_prompt(cast(Prompt, prompt), tokenizer)
    if tokenizer is None:
        raise RequestError("messages", prompt, "the model brings no tokenizer: give token ids, or set tokenizer=")
    return None, tokenizer.encode_chat(prompt)


def default_sampling_params(opened: OpenModel) -> SamplingParams:
    """What the model's `generation_config.json` recommends, where it is valid."""
    advice = opened.files.generation_config
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    chosen = {name: advice[name] for name in names if advice.get(name) is not None}
    if advice.get("do_sample") is False:
        chosen["temperature"] = 0.0
    try:
        return SamplingParams(**chosen)
    except RequestError:
        return SamplingParams()


def _is_conversation(value: object) -> TypeGuard[Messages]:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and isinstance(value[0], Mapping)
        and "role" in value[0]
    )
