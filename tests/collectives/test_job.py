"""Measurements in processes of their own: they join, they agree, and they are ended when one fails or hangs."""

import json
import sys

import psutil
import pytest
from typer.testing import CliRunner

from ryzanstein_jax.cli import app
from ryzanstein_jax.collectives import job as jobs
from ryzanstein_jax.collectives.job import AIM_BYTES, Job, run_job
from ryzanstein_jax.commands.bench import parse_size, size_name
from ryzanstein_jax.errors import ConfigError, ProcessGroupError


def test_two_processes_measure_together():
    job = Job(processes=2, devices=1, operations=("all-reduce", "send-recv"), most=4096, budget=0.01, timeout=120)
    result = run_job(job)
    assert (result["processes"], result["devices"], result["backend"]) == (2, 2, "Gloo")
    points = [(point["operation"], point["bytes"]) for point in result["points"]]
    assert points == [("all-reduce", 1024), ("all-reduce", 4096), ("send-recv", 1024), ("send-recv", 4096)]
    for point in result["points"]:
        assert point["values_checked"] == 2 * 2 * point["bytes"] // 4
    assert set(result["fits"]) == {"all-reduce", "send-recv"}
    assert {"name": "jax_cpu_collectives_implementation", "value": "gloo", "origin": "code"} in result["settings"]


def test_a_network_interface_that_is_not_there_is_told():
    job = Job(processes=2, devices=1, most=1024, timeout=120, given={"RYZANSTEIN_GLOO_INTERFACE": "nowhere0"})
    with pytest.raises(ProcessGroupError, match="nowhere0"):
        run_job(job)


def test_the_command_writes_figures_and_a_picture(tmp_path):
    figures, picture = tmp_path / "new" / "figures.json", tmp_path / "picture.png"
    arguments = ["bench", "collectives", "--devices", "2", "--max", "4K", "--operation", "all-gather"]
    arguments += ["--budget", "0.01", "--link-gb-per-s", "10", "--json", str(figures), "--plot", str(picture)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "all results are right" in done.stdout
    result = json.loads(figures.read_text())
    assert {"machine", "versions", "commit", "date", "dtype", "link_gb_per_s"} <= result.keys()
    assert result["backend"] == "XLA, within the process"
    assert picture.read_bytes().startswith(b"\x89PNG")


RANK = """
import json, os, sys, time
order = json.load(sys.stdin)
print("a library prints this")
print(json.dumps({"event": "start", "platform": "cpu"}), flush=True)
"""


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Has `job` start a script in place of a rank."""

    def use(code: str) -> None:
        script = tmp_path / "rank.py"
        script.write_text(RANK + code)
        popen = jobs.subprocess.Popen

        def start(command, **more):
            return popen([sys.executable, str(script), *command[3:]], **more)

        monkeypatch.setattr(jobs.subprocess, "Popen", start)

    return use


def test_what_a_rank_says_last_is_told(ranks):
    ranks("sys.exit('the runtime gave up')")
    with pytest.raises(ProcessGroupError, match="rank 0 ended with 1: the runtime gave up"):
        run_job(Job(most=1024))


def test_a_rank_that_fails_ends_those_that_wait_for_it(ranks):
    ranks(
        "if order['rank']:\n    print(json.dumps({'event': 'failed', 'message': 'a wrong sum'}), flush=True)\n"
        "time.sleep(600)"
    )
    with pytest.raises(ProcessGroupError, match="rank 1: a wrong sum"):
        run_job(Job(processes=2, devices=1, most=1024))
    assert not psutil.Process().children()


def test_a_rank_that_hangs_ends_at_the_deadline(ranks):
    ranks("time.sleep(600)")
    with pytest.raises(ProcessGroupError, match="no end within 0.5 s; rank 0, 1 has not finished"):
        run_job(Job(processes=2, devices=1, most=1024, timeout=0.5))
    assert not psutil.Process().children()


def test_a_rank_that_writes_without_end_is_ended(ranks):
    ranks("os.write(1, b'x' * (1 << 22))")
    with pytest.raises(ProcessGroupError, match="writes without end"):
        run_job(Job(most=1024))


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("processes", {"processes": 0}),
        ("devices", {"devices": 1}),
        ("devices", {"processes": 2}),
        ("factor", {"factor": 1}),
        ("least", {"least": 4096, "most": 1024}),
        ("operations", {"operations": ("gossip",)}),
        ("operations", {"operations": ()}),
        ("dtype", {"dtype": "int4"}),
        ("budget", {"budget": 0}),
        ("timeout", {"timeout": float("nan")}),
        ("most", {"devices": 64, "most": 1 << 34}),
    ],
)
def test_what_can_not_be_measured_is_refused_before_anything_starts(field, settings):
    with pytest.raises(ConfigError, match=field):
        Job(**settings)


def test_sizes_and_the_one_that_the_aim_is_for():
    job = Job(operations=("all-reduce", "broadcast"), least=1 << 20, most=1 << 24)
    assert job.sizes == [1 << 20, 1 << 22, 1 << 24]
    assert ("all-reduce", AIM_BYTES) in job.points
    assert ("broadcast", AIM_BYTES) not in job.points
    assert [parse_size("max", text) for text in ("64", "1K", "3MiB", "2g")] == [64, 1024, 3 << 20, 2 << 30]
    assert [size_name(size) for size in (64, 1024, 3 << 20, 10_000_000)] == ["64", "1K", "3M", "10000000"]
    for wrong in ("", "K", "1T", "-1", "1.5M"):
        with pytest.raises(ConfigError):
            parse_size("max", wrong)
