"""Ranks are killed under completions that follow grammars: they end with the tokens of an undisturbed run."""

import json
from pathlib import Path

from ryzanstein_jax import AsyncLLM, SamplingParams, StructuredOutputsParams
from tests.faults import harness
from tests.faults.harness import OPTIONS, SETTINGS, Watch, events, kill, nothing_left_behind, run_streams, same
from tests.server.model import tiny_model

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "ages": {"type": "array", "items": {"enum": [1, 22]}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}


def test_grammars_outlive_the_ranks(tmp_path: Path, monkeypatch) -> None:
    forms = [
        {"json": SCHEMA, "disable_any_whitespace": True},
        {"regex": "[a-z]{20,40}"},
        {"choice": ["a long way round", "a longer way round"]},
        None,
    ]

    def requests() -> list[tuple[list[int], SamplingParams]]:
        found = []
        for number in range(12):
            form = forms[number % len(forms)]
            chosen = StructuredOutputsParams(**form) if form is not None else None
            params = SamplingParams(max_tokens=48, seed=number, n=1 + number % 2, structured_outputs=chosen)
            found.append(([(7 * number + place) % 100 + 4 for place in range(5)], params))
        return found

    monkeypatch.setattr(harness, "requests", requests)
    logs = tmp_path / "logs"
    logs.mkdir()
    with nothing_left_behind(logs):
        options = {**OPTIONS, "log_dir": str(logs)}
        llm = AsyncLLM(str(tiny_model(tmp_path)), executor="processes", orchestrator=options, **SETTINGS)
        try:
            expected = run_streams(llm)
            watch = Watch(sum(len(c.token_ids) for one in expected for c in one) // 3, lambda: kill(llm, 1))
            found = run_streams(llm, watch)
            assert watch.done and events(llm, "recovered")
        finally:
            llm.close()
    same(found, expected)
    for number, outputs in enumerate(found):
        if number % len(forms) == 0:
            for completion in outputs:
                if completion.finish_reason == "stop":
                    assert json.loads(completion.text)["name"] is not None
