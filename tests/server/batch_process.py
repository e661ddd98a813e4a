"""A batch over the fake engine in a process of its own, which tests kill: python -m tests.server.batch_process ..."""

import asyncio
import resource
import sys
from pathlib import Path

from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.server.batch import Batch, batch_config
from tests.server.serving import MODEL, FakeBackend


async def slowly(step: int) -> None:
    await asyncio.sleep(0.001)


def main(model: str, source: str, output: str, most_bytes: str = "0") -> None:
    if int(most_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(most_bytes), int(most_bytes)))
    work = Batch(Path(source), Path(output), 4, batch_config(4))
    print("opened", flush=True)
    backend = FakeBackend(Tokenizer.from_folder(Path(model)))
    backend.act = slowly
    try:
        asyncio.run(work.run(backend, MODEL, "1.2.3", lambda counts: None))
    finally:
        work.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
