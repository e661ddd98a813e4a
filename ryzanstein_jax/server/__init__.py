"""The OpenAI-compatible server; `run.serve` starts it. Needs the extra `serve`."""
