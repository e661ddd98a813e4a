"""Where this package keeps files between runs."""

from __future__ import annotations

import os
from pathlib import Path

from ryzanstein_jax.errors import ConfigError


def cache_dir() -> Path:
    """The user's cache folder of this package; it may not exist yet.

    `RYZANSTEIN_CACHE` names it; else it is `ryzanstein_jax` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        ConfigError: the user has no home folder and neither variable is set.
    """
    own = os.environ.get("RYZANSTEIN_CACHE")
    try:
        if own:
            return Path(own).expanduser().absolute()
        shared = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG specification: a relative path is invalid and has to be ignored.
        base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError("RYZANSTEIN_CACHE", own, "set it to a folder: this user has no home folder") from error
    return base / "ryzanstein_jax"
