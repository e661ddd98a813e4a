"""The secret that the leader and the agents of other machines share.

It comes from a file, or to a worker also in a variable of the environment, and goes nowhere: it is no argument, in no
log, and in the environment of no process that is started.
"""

from __future__ import annotations

import os
import stat

from ryzanstein_jax.errors import ConfigError

#: A worker may find the secret here.
SECRET_VARIABLE = "RYZANSTEIN_SECRET"
MIN_SECRET_BYTES = 16
_MAX_SECRET_BYTES = 4096


def read_secret(path: str, field: str = "secret_file") -> bytes:
    """The secret in a file, without white space around it.

    Raises:
        ConfigError: the file can't be read, others may read it, or the secret is too short.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise ConfigError(field, path, f"give a file that can be read ({error.strerror})") from error
    # Kubernetes mounts secrets as root's and lets a user who is not root read them as the group.
    forbidden = 0o077 if status.st_uid == os.geteuid() else 0o037
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()) or status.st_mode & forbidden:
        raise ConfigError(field, path, "others may read it, or it is somebody else's: chown it to you and chmod 600")
    return check_secret(content, field, path)


def check_secret(content: bytes, field: str, shown: str) -> bytes:
    """The secret, if it is one; `shown` stands for it in the error.

    Raises:
        ConfigError: it is too short or too long.
    """
    secret = content.strip()
    if not MIN_SECRET_BYTES <= len(secret) <= _MAX_SECRET_BYTES:
        remedy = (
            f"the secret has to have {MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES} bytes: `openssl rand -hex 32` makes one"
        )
        raise ConfigError(field, shown, remedy)
    return secret
