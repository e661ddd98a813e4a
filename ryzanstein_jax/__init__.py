"""LLM inference in JAX on many devices. Importing this package does not import JAX."""

from ryzanstein_jax.async_llm import AsyncLLM
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.llm import LLM
from ryzanstein_jax.request import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    PoolingParams,
    RequestOutput,
    SamplingParams,
)
from ryzanstein_jax.streams import StreamChunk
from ryzanstein_jax.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "Logprob",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
    "StructuredOutputsParams",
    "__version__",
]
