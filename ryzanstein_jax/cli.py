"""`ryzanstein`: what the command line offers. Each command is a function of `commands/`."""

from __future__ import annotations

import sys

import typer

from ryzanstein_jax.commands.batch import batch
from ryzanstein_jax.commands.bench import bench
from ryzanstein_jax.commands.demo import demo
from ryzanstein_jax.commands.doctor import doctor
from ryzanstein_jax.commands.generate import chat, generate
from ryzanstein_jax.commands.models import info, snapshot
from ryzanstein_jax.commands.plan import plan
from ryzanstein_jax.commands.serve import serve
from ryzanstein_jax.commands.worker import worker
from ryzanstein_jax.errors import RyzansteinError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LLM inference in JAX on many devices.",
)
for command in (generate, chat, serve, batch, snapshot, info, plan, worker, doctor, demo):
    app.command()(command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Runs the command line; what the user can mend is one line, without a traceback."""
    try:
        app()
    except (RyzansteinError, OSError) as error:
        print(f"ryzanstein: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
