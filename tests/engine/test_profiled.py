"""A profile changes no token and tells where the time of each step went."""

import json

import pytest

from ryzanstein_jax.engine.profiled import SKIPPED, StepTimes, summary
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.llm import LLM
from ryzanstein_jax.request import SamplingParams
from tests.support import GOLDEN, quick_compiles

SETTINGS = dict(max_num_seqs=2, max_num_batched_tokens=16, num_pages=20, progress=False, compilation_cache_dir="")
PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PROMPTS = [[5, 9, 11], [7] * 20]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compiles():
        yield


def tokens(**settings) -> list[list[int]]:
    with LLM(str(GOLDEN / "smollm2"), **SETTINGS, **settings) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


def test_steps_are_watched_and_no_token_changes(tmp_path):
    assert tokens(profile_dir=str(tmp_path), profile_steps=12) == tokens()
    (rank,) = tmp_path.iterdir()
    steps = json.loads((rank / "steps.json").read_text())
    assert rank.name == "rank-0" and [step["step"] for step in steps] == list(range(SKIPPED, SKIPPED + 12))
    for step in steps:
        assert step["decodes"] + step["prompt_tokens"] and step["dispatch"] > 0 and step["device"] > 0
        # The step was dispatched while its predecessor ran, so the host's part was hidden behind that.
        assert 0 <= step["host"] < 10
    assert list(rank.rglob("*.xplane.pb")), "the trace that JAX writes"
    assert "device" in (rank / "summary.txt").read_text()


def test_what_was_watched_until_the_end_is_written(tmp_path):
    tokens(profile_dir=str(tmp_path), profile_steps=1000)
    steps = json.loads((tmp_path / "rank-0" / "steps.json").read_text())
    assert 10 < len(steps) < 40


def test_a_folder_that_is_none_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="profile_dir"):
        tokens(profile_dir=str(tmp_path / "file"))


def test_the_table_has_a_line_for_each_kind_of_step():
    decode = StepTimes(0, 4, 0, 4, 0.001, 0.0001, 0.010, 0.008, False)
    prompt = StepTimes(1, 0, 200, 1, None, 0.0002, 0.200, 0.0, True)
    lines = summary([decode, decode, prompt]).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["2", "4", "0", "1.000", "0.100", "10.00", "8.00", "0"],
        ["1", "0", "200", "0.000", "0.200", "200.00", "0.00", "1"],
    ]
    assert "220.0 ms on the device and 2.4 ms of the host" in lines[3]
