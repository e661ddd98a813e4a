"""The engine inside of Jupyter: a kernel's own event loop runs already, and the kernel ends cleanly."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))

CELLS = [
    """
import asyncio
from ryzanstein_jax import LLM, AsyncLLM, SamplingParams
settings = dict(max_num_seqs=1, max_num_batched_tokens=32, num_pages=20)
params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
prompt = list(range(3, 20))
""",
    """
with LLM("tests/golden/smollm2", tensor_parallel_size=2, **settings) as llm:
    (output,) = llm.generate([prompt], params)
    streamed = [token for chunk in llm.stream(prompt, params) for token in chunk.token_ids]
tokens = output.outputs[0].token_ids
assert streamed == tokens and len(tokens) == 5
""",
    """
async with AsyncLLM("tests/golden/smollm2", tensor_parallel_size=2, **settings) as llm:
    outputs = await asyncio.gather(llm.generate(prompt, params), llm.generate(prompt, params))
assert [o.outputs[0].token_ids for o in outputs] == [tokens, tokens]
print("same tokens")
""",
]


def test_a_notebook_uses_the_engine_both_ways():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": "."}}
    )
    client.execute()
    assert notebook.cells[-1].outputs[-1]["text"] == "same tokens\n"


def test_the_notebooks_are_there():
    assert {"quickstart", "tensor_parallelism", "recovery", "planning"} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_of_ours_runs_and_shows_what_it_did(path):
    """With the real model; what it says about tokens it asserts itself. The outputs that are kept are a reader's."""
    notebook = nbformat.read(path, 4)
    kept = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in kept), "a reader sees no picture"
    assert path.stat().st_size < 200_000
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == sum(
        "image/png" in output.get("data", {}) for output in kept
    )
