"""Files that appear whole or not at all."""

import subprocess
import sys

from ryzanstein_jax.cache import clear_partial, whole_file


def test_what_a_killed_writer_left_is_deleted_and_a_living_one_s_is_not(tmp_path):
    code = """
import sys, time
from pathlib import Path
from ryzanstein_jax.cache import whole_file
with whole_file(Path(sys.argv[1])) as file:
    print("it writes", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "k.executable")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "it writes\n"
        (partial,) = tmp_path.iterdir()
        assert partial.stat().st_mode & 0o777 == 0o600
        clear_partial(tmp_path)
        assert partial.exists()
        writer.kill()
    clear_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_once_it_is_whole(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half" and list(tmp_path.iterdir()) == [path]
    try:
        with whole_file(path) as file:
            file.write(b"other")
            raise KeyError
    except KeyError:
        assert path.read_bytes() == b"half" and list(tmp_path.iterdir()) == [path]


def test_what_was_cleared_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    import fcntl

    lock, taken = fcntl.flock, []

    def late(descriptor, operation):
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with whole_file(tmp_path / "file") as file:
        file.write(b"whole")
    assert len(taken) == 1 and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_not_there_is_clear(tmp_path):
    clear_partial(tmp_path / "none")
