"""Loads a program from a store and runs it, in a process that has never traced it: `python -m tests.native.child`."""

import sys

import jax
import numpy as np

from ryzanstein_jax import native
from ryzanstein_jax.executables import ExecutableStore
from ryzanstein_jax.sharding import make_mesh
from tests.native.programs import arguments

if __name__ == "__main__":
    folder, key, result = sys.argv[1:]
    compiled = []
    native._compiled = lambda kernel, name: compiled.append(name)  # nothing is left to compile
    program = ExecutableStore(folder).load(key, make_mesh(2))
    assert program is not None and not compiled
    known = [found.name for found in native._registered.values()]
    assert known and all(name in program.as_text() for name in known), "what it calls, and nothing more"
    with jax.set_mesh(make_mesh(2)):
        np.save(result, np.asarray(program(*arguments())))
