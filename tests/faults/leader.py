"""A leader that serves and waits to be killed; prints the pids of all its processes."""

import json
import sys

import psutil

from ryzanstein_jax import LLM


def main() -> None:
    settings = json.loads(sys.argv[1])
    llm = LLM(settings.pop("model"), executor="processes", **settings)
    llm.generate([[1, 2, 3]], use_tqdm=False)
    print(json.dumps([child.pid for child in psutil.Process().children(recursive=True)]), flush=True)
    while True:
        llm.generate([[1, 2, 3]] * 8, use_tqdm=False)


if __name__ == "__main__":
    main()
