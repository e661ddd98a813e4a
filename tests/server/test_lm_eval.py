"""lm-eval's `local-completions` against the server, unchanged: prompts as tokens, log-probabilities with echo."""

import asyncio
import json
from pathlib import Path

import pytest

from ryzanstein_jax import AsyncLLM, SamplingParams
from tests.server.serving import MODEL, Served

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

DOCUMENTS = [
    {"question": "One and one is", "choices": [" two", " three"], "answer": 0},
    {"question": "The sky is", "choices": [" green", " blue", " a fish"], "answer": 1},
    {"question": "Water is", "choices": [" dry", " wet"], "answer": 1},
]
STARTS = [{"text": "Hello"}, {"text": "One, two,"}]


def tasks(folder: Path) -> list[dict[str, object]]:
    """A task of choices and one of texts, on data of this machine."""

    def data(name: str, documents: list[dict[str, object]]) -> dict[str, object]:
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        files = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
        return {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}

    return [
        {
            **data("choices", DOCUMENTS), "output_type": "multiple_choice", "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        {
            **data("texts", STARTS), "output_type": "generate_until", "doc_to_text": "{{text}}",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]  # fmt: skip


def test_a_task_of_choices_and_one_of_texts(served: Served, engine: AsyncLLM, tiny: Path, tmp_path: Path) -> None:
    arguments = dict(
        model=MODEL, base_url=f"{served.url}/v1/completions", tokenizer=str(tiny), tokenizer_backend="huggingface",
        max_length=128, num_concurrent=2, max_retries=1,
    )  # fmt: skip
    found = lm_eval.simple_evaluate(
        model="local-completions", model_args=arguments, tasks=tasks(tmp_path), log_samples=True, bootstrap_iters=0,
        batch_size=2,
    )  # fmt: skip
    assert found is not None
    right = 0
    for sample in found["samples"]["choices"]:
        document = sample["doc"]
        scores = [value for value, _ in (response[0] for response in sample["resps"])]
        expected = [score(engine, document["question"], choice) for choice in document["choices"]]
        assert [float(value) for value in scores] == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == document["answer"]
    assert found["results"]["choices"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))
    for sample in found["samples"]["texts"]:
        params = SamplingParams(max_tokens=8, temperature=0, stop=("\n",))
        text = asyncio.run(engine.generate(sample["doc"]["text"], params)).outputs[0].text
        assert sample["resps"][0][0] == text


def score(engine: AsyncLLM, question: str, choice: str) -> float:
    """Log-probability of a choice after its question; a character is a token."""
    ids = engine.tokenizer.encode(question + choice)
    scored = asyncio.run(engine.generate(ids, SamplingParams(max_tokens=1, prompt_logprobs=0))).prompt_logprobs
    return sum(scored[place][ids[place]].logprob for place in range(len(question), len(ids)))
