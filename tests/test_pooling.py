"""Sums of hidden states, what a model's folder says about them, and embeddings through `LLM` and `AsyncLLM`."""

import asyncio
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ryzanstein_jax import LLM, AsyncLLM, PoolingParams, SamplingParams
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.local import snapshot_model
from ryzanstein_jax.engine.open import open_model, pooling_of
from ryzanstein_jax.errors import ConfigError, RequestError
from ryzanstein_jax.pooling import pool
from tests.support import GOLDEN, quick_compiles

SETTINGS = dict(max_num_seqs=2, max_num_batched_tokens=16, compilation_cache_dir="", progress=False)
HIDDEN = np.load(GOLDEN / "qwen3" / "hidden.npy")


def prompt() -> list[int]:
    with np.load(GOLDEN / "qwen3" / "expected.npz") as stored:
        return stored["prompt"].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_range_is_summed_in_float32(dtype):
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(20, 6)), dtype)
    pools = np.array([[0, 0], [3, 9], [10, 19], [0, 0]], np.int32)
    found = pool(hidden, pools)
    assert found.dtype == jnp.float32
    exact = np.asarray(hidden, np.float64)
    wanted = [exact[first : last + 1].sum(axis=0) for first, last in pools]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_pool_only(bad):
    hidden = np.ones((8, 3), np.float32)
    hidden[5, 1] = bad
    found = np.asarray(pool(jnp.asarray(hidden), np.array([[0, 4], [5, 6], [7, 7]], np.int32)))
    np.testing.assert_array_equal(found[[0, 2]], [[5, 5, 5], [1, 1, 1]])
    assert np.isnan(found[1]).all()


OLD = {"word_embedding_dimension": 40, "pooling_mode_cls_token": False, "include_prompt": True}


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({}, "last"),
        ({**OLD, "pooling_mode_lasttoken": True}, "last"),
        ({**OLD, "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "mean"),
        ({**OLD, "pooling_mode_mean_sqrt_len_tokens": True}, "mean"),
        ({"embedding_dimension": 40, "pooling_mode": "lasttoken"}, "last"),
        ({"embedding_dimension": 40, "pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_a_folder_says_how_to_pool(config, pooling):
    assert pooling_of(config) == pooling


@pytest.mark.parametrize(
    "config",
    [
        {**OLD, "pooling_mode_cls_token": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        {"pooling_mode": "max"}, {"pooling_mode": [["mean"]]}, {"pooling_mode": 5}, {"pooling_mode": {}}, OLD,
    ],
)  # fmt: skip
def test_other_poolings_are_refused_by_name(config):
    with pytest.raises(RequestError, match="embedding_pooling") as raised:
        pooling_of(config)
    assert raised.value.field == "pooling"


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="embedding_pooling"):
        EngineConfig("x", embedding_pooling="cls")
    with pytest.raises(RequestError, match="pooling"):
        PoolingParams(pooling="cls")
    for dimensions in (0, -1, True, 1.5):
        with pytest.raises(RequestError, match="dimensions"):
            PoolingParams(dimensions=dimensions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden Qwen3 as sentence-transformers would have it, with mean pooling."""
    made = tmp_path_factory.mktemp("model") / "qwen3"
    shutil.copytree(GOLDEN / "qwen3", made)
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text(json.dumps({**OLD, "pooling_mode_mean_tokens": True}))
    return made


def test_embeddings_in_python(folder):
    """Prompts of several chunks, one of a single token, beside a completion; the folder's pooling and the caller's."""
    ids = prompt()
    with quick_compiles(), LLM(str(folder), **SETTINGS) as llm:
        before = llm.metrics.counter("compiles")
        found = llm.embed([ids, ids[:1], ids[:17]])
        for output, count in zip(found, (40, 1, 17), strict=True):
            mean = HIDDEN[:count].mean(axis=0)
            np.testing.assert_allclose(output.outputs.embedding, mean / np.linalg.norm(mean), atol=1e-4)
            assert output.prompt_token_ids == ids[:count] and output.finished
        (one,) = llm.embed({"prompt_token_ids": ids}, pooling_params=PoolingParams(pooling="last", dimensions=5))
        np.testing.assert_allclose(one.outputs.embedding, HIDDEN[-1, :5] / np.linalg.norm(HIDDEN[-1, :5]), atol=1e-4)
        assert llm.generate(ids, SamplingParams(max_tokens=2))[0].finished
        for wrong in (PoolingParams(dimensions=41), PoolingParams(dimensions=10**5)):
            with pytest.raises(RequestError, match="40"):
                llm.embed(ids, pooling_params=wrong)
        with pytest.raises(RequestError):
            llm.embed([ids, []])
        assert llm.metrics.counter("compiles") == before

    async def main() -> np.ndarray:
        async with AsyncLLM(str(folder), embedding_pooling="last", **SETTINGS) as llm:
            outputs = await asyncio.gather(*(llm.embed(ids[:count]) for count in (40, 2, 30)))
            return [output.embedding for output in outputs]

    with quick_compiles():
        for found, count in zip(asyncio.run(main()), (40, 2, 30), strict=True):
            wanted = HIDDEN[count - 1] / np.linalg.norm(HIDDEN[count - 1])
            np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_snapshot_keeps_the_pooling(folder, tmp_path):
    made = snapshot_model(EngineConfig(str(folder), compilation_cache_dir=""), tmp_path / "snapshot")
    opened = open_model(EngineConfig(str(made)))
    assert opened.files.kind == "snapshot" and opened.pooling_params().pooling == "mean"
