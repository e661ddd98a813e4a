"""Run folders: the living keep theirs, the dead don't, failures stay a while, other files are left alone."""

import subprocess
import sys
import time
from pathlib import Path

from ryzanstein_jax.orchestrator.run_folder import KEPT_FAILURES, RunFolder

ROOT = Path(__file__).resolve().parents[2]


def test_a_clean_end_removes_it_and_a_failure_keeps_it(tmp_path):
    clean, failed = RunFolder(tmp_path), RunFolder(tmp_path)
    assert clean.path != failed.path
    (failed.path / "rank-0.log").write_text("why")
    clean.close(keep=False)
    failed.close(keep=True)
    failed.close(keep=False)  # it is closed already
    assert not clean.path.exists()
    third = RunFolder(tmp_path)
    assert (failed.path / "rank-0.log").read_text() == "why"
    third.close(keep=False)


def test_only_the_last_failures_are_kept(tmp_path):
    folders = []
    for _ in range(KEPT_FAILURES + 2):
        folders.append(RunFolder(tmp_path))
        folders[-1].close(keep=True)
        time.sleep(0.02)
    last = RunFolder(tmp_path)
    assert {path for path in tmp_path.glob("run-*") if path != last.path} == {f.path for f in folders[-KEPT_FAILURES:]}
    last.close(keep=False)


def test_a_living_leader_s_folder_stays_until_it_is_dead(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ryzanstein_jax.orchestrator.run_folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1])); print(folder.path, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as leader:
        path = Path(leader.stdout.readline().strip())
        RunFolder(tmp_path).close(keep=False)
        assert path.is_dir()
        leader.kill()
        leader.wait(20)
    RunFolder(tmp_path).close(keep=False)
    assert not path.exists()


def test_what_is_not_ours_stays(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "lock").touch()
    base = tmp_path / "base"
    base.mkdir()
    (base / "run-1-2-3").symlink_to(outside)
    for name in ("run-1-2-4", "notes"):
        (base / name).mkdir()
    (base / "notes" / "lock").touch()
    (base / "run-1-2-5").mkdir()
    (base / "run-1-2-5" / "lock").touch()
    RunFolder(base).close(keep=False)
    assert sorted(path.name for path in base.iterdir()) == [".lock", "notes", "run-1-2-3", "run-1-2-4"]
    assert outside.is_dir()
