"""A leader that serves, with a standby, and waits to be killed; prints the pids of all its processes."""

import json
import sys
import time

import psutil

from ryzanstein_jax import LLM


def main() -> None:
    settings = json.loads(sys.argv[1])
    llm = LLM(settings.pop("model"), executor="processes", orchestrator={"standby": True}, **settings)
    llm.generate([[1, 2, 3]], use_tqdm=False)
    assert llm.orchestrator is not None
    while not (llm.orchestrator.status()["standby"] or {}).get("prepared"):
        time.sleep(0.02)
    # Not those that have ended and were not asked for yet.
    children = psutil.Process().children(recursive=True)
    print(json.dumps([child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]), flush=True)
    while True:
        llm.generate([[1, 2, 3]] * 8, use_tqdm=False)


if __name__ == "__main__":
    main()
