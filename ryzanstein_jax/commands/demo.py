"""`ryzanstein demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from ryzanstein_jax.commands.options import MaxTokens, Width


def demo(
    prompt: Annotated[str, typer.Option("--prompt", "-p")] = "Why is the sky blue? Answer in three sentences.",
    tp: Width = 2,
    max_tokens: MaxTokens = 160,
) -> None:
    """Streams a chat answer of SmolLM2-135M-Instruct over two CPU devices, then prints the figures."""
    from ryzanstein_jax.demo import run_demo

    run_demo(prompt, tp, max_tokens)
