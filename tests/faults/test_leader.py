"""What is left when the leader itself is killed: nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.harness import MODEL, SETTINGS
from tests.support import is_running


@pytest.mark.parametrize("stopped", [False, True], ids=["all run", "a rank is stopped"])
def test_no_worker_survives_the_leader(stopped: bool, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "tests.faults.leader", json.dumps({"model": MODEL, **SETTINGS}),
    ]  # fmt: skip
    environment = {**os.environ, "RYZANSTEIN_FAULT": ""}
    root = Path(__file__).resolve().parents[2]
    leader = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=environment, text=True)
    try:
        assert leader.stdout is not None
        line = leader.stdout.readline()
        processes = [psutil.Process(pid) for pid in json.loads(line)]
        assert len(processes) == 5, "an agent, two ranks that serve and two that stand by"
        if stopped:
            next(process for process in processes if process.ppid() != leader.pid).suspend()
        leader.kill()
        deadline = time.monotonic() + 2.0
        while any(map(is_running, processes)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [process for process in processes if is_running(process)]
    finally:
        leader.kill()
        leader.wait()
