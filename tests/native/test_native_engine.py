"""A whole engine with the kernels, beside one without."""

import json

import numpy as np
import pytest

from ryzanstein_jax import native
from ryzanstein_jax.native.attention import Attention
from ryzanstein_jax.request import SamplingParams
from tests.support import GOLDEN, kernels, open_engine, quick_compiles, serve, tokens_of

#: More than the step holds, so that prompts are cut and decode beside others; two begin alike.
PROMPTS = {name: np.random.default_rng(seed).integers(0, 90, size) for seed, (name, size) in enumerate(
    {"long": 75, "short": 3, "page": 32, "more": 50}.items()
)}  # fmt: skip
PROMPTS["alike"] = np.concatenate([PROMPTS["long"][:60], PROMPTS["short"]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Llama with heads that any vectors divide."""
    folder = tmp_path_factory.mktemp("model")
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 32, "num_hidden_layers": 1}))
    return folder


def test_the_same_tokens_as_without(model):
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    requests = {name: (prompt.tolist(), greedy) for name, prompt in PROMPTS.items()}
    found = {}
    for setting in ("", "portable"):
        with kernels(setting), quick_compiles():
            engine, _ = open_engine(model, load_format="dummy", tensor_parallel_size=2, num_pages=64, max_model_len=128)
            found[setting] = tokens_of(serve(engine, requests))
        engine.close()
    used = {kernel.head_dim for kernel in native._registered if isinstance(kernel, Attention)}
    assert 32 in used or not native.processor().lanes
    assert found[""] == found["portable"]
    assert len({tuple(tokens[0]) for tokens in found[""].values()}) > 3
