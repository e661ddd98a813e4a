"""What is left when the leader itself is killed: nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.harness import MODEL, SETTINGS


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
        pids = json.loads(line)
        assert len(pids) == 5, "an agent, two ranks that serve and two that stand by"
        if stopped:
            ranks = [pid for pid in pids if psutil.Process(pid).ppid() != leader.pid]
            os.kill(ranks[0], signal.SIGSTOP)
        leader.kill()
        deadline = time.monotonic() + 2.0
        while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
    finally:
        leader.kill()
        leader.wait()
