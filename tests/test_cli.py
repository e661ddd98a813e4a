"""The command line, run as a user runs it: in a process of its own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from ryzanstein_jax import LLM, SamplingParams
from ryzanstein_jax.cli import app
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.llm import encode_prompt
from tests.server.model import tiny_model

GOLDEN = "tests/golden/smollm2"


def run(*arguments, stdin="", expect=0):
    done = subprocess.run(
        [sys.executable, "-m", "ryzanstein_jax.cli", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": "."},
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return done.stdout, done.stderr


def test_info_shows_what_a_model_takes_at_each_width():
    done = CliRunner().invoke(app, ["info", GOLDEN, "--json"])
    facts = json.loads(done.stdout)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == 131 * 36 + 36 + 3 * (2 * 36 * 36 + 2 * 36 * 12 + 3 * 36 * 52 + 2 * 36)
    widths = {entry["width"]: entry for entry in facts["per_device"]}
    assert widths[1]["weights"] == facts["parameters"]
    assert widths[1]["padding"] == 0
    assert widths[8]["weights"] < widths[4]["weights"] < widths[2]["weights"] < widths[1]["weights"]
    shown = CliRunner().invoke(app, ["info", GOLDEN], env={"COLUMNS": "80"}).stdout
    assert "parameters" in shown and "padding" in shown and "…" not in shown, "all of it fits a terminal"


def test_a_mistake_is_one_line_without_a_traceback():
    for arguments, message in (
        (["info", "no/such-model"], "ConfigError: model="),
        (["generate", GOLDEN, "-p", "x", "--dtype", "float8"], "ConfigError: dtype='float8'"),
        (["generate", GOLDEN], "give --prompt or --file"),
    ):
        _, error = run(*arguments, expect=1)
        assert message in error
        assert "Traceback" not in error


def test_a_snapshot_restores_onto_another_width(tmp_path):
    folder = tmp_path / "snap"
    out, _ = run("snapshot", GOLDEN, folder, "--tp", 2)
    assert out.strip() == str(folder)
    _, error = run("snapshot", GOLDEN, folder, expect=1)
    assert "exists" in error
    expected = np.load(f"{GOLDEN}/expected.npz")
    settings = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "num_pages": 20, "progress": False}
    with LLM(str(folder), tensor_parallel_size=8, **settings) as llm:
        (output,) = llm.generate([expected["prompt"].tolist()], SamplingParams(temperature=0, max_tokens=16))
    assert output.outputs[0].token_ids == expected["generated"].tolist()


def test_generate_and_chat_with_the_real_model(smollm2_path, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of France is\n\nTwo plus two is\n")
    small = ["--max-model-len", 96, "--temperature", 0]
    # A chat's settings, so that it finds the programs that this compiled.
    out, error = run("generate", smollm2_path, "-f", prompts, "--json", "-n", 8, "--max-num-seqs", 1, *small)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["The capital of France is", "Two plus two is"]
    assert "Paris" in lines[0]["text"]
    assert len(lines[0]["token_ids"]) == 8
    assert "KV cache" in error

    out, _ = run("chat", smollm2_path, "-n", 24, *small, stdin="What is the capital of France?\n/reset\n\n/quit\n")
    assert "Paris" in out


def test_completions_keep_to_a_schema_from_a_file(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"]}')
    model = tiny_model(tmp_path)
    small = ["--max-model-len", "64", "--max-num-seqs", "1", "--json", "--seed", "1", "-n", "60"]
    asked = ["generate", str(model), "-p", "x", *small, "--json-schema"]
    done = CliRunner().invoke(app, [*asked, str(schema)])
    assert done.exit_code == 0, done.output
    (line,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert line["finish_reason"] == "length" or json.loads(line["text"])["a"] in (1, 22)
    assert line["text"].lstrip().startswith("{")
    schema.write_text("{")
    for file, message in ((schema, "JSON"), (tmp_path / "none", "FileNotFoundError")):
        error = CliRunner().invoke(app, [*asked, str(file)]).exception
        assert isinstance(error, ConfigError) and error.field == "json_schema" and message in str(error)


@pytest.mark.parametrize("prompt", [3, {"text": "x"}, b"bytes", None])
def test_a_prompt_of_no_known_form_is_refused(prompt):
    with pytest.raises(ValueError, match="prompt"):
        encode_prompt(prompt, None)
