"""The engine inside of Jupyter: a kernel's own event loop runs already, and the kernel ends cleanly."""

import nbclient
import nbformat

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
