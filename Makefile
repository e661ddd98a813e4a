# make demo    a chat answer, streamed, on two CPU devices; the figures after it
# make test    style, types, the tests with coverage, and a part of them on the oldest JAX
# make lint    style and types only
# make bench   benchmarks; results go to bench/results
# make clean   removes what the others made
#
# Each sets up .venv first, with the newest Python that works here; PYTHON=/path/to/python chooses one.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint oldest bench clean

python := .venv/bin/python
oldest_python := .venv-oldest/bin/python
oldest_version := 3.11
oldest_jax := jax==0.10.*

# What may differ between versions of JAX, Python and numpy and runs in seconds.
oldest_tests := $(wildcard tests/test_architecture.py tests/test_plan.py tests/test_config.py tests/test_request.py \
	tests/test_metrics.py tests/test_sharding.py tests/test_kv_cache.py tests/test_attention.py tests/test_sampling.py \
	tests/test_step.py tests/test_memory.py tests/model tests/engine tests/orchestrator)

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

setup:
	@tools/make_venv.sh .venv newest

demo: setup
	@.venv/bin/ryzanstein demo

lint: setup
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

# The coverage that is asked for stands in pyproject.toml: tool.coverage.report.fail_under.
# The tests compile for GPUs too, with the compiler that the extra `plan` brings; no GPU is needed.
test: lint
	$(python) -m pip install --quiet --disable-pip-version-check --editable '.[plan]'
	$(python) -m pytest -q -n 2 --durations=15 --cov --cov-report=term
	@$(MAKE) --no-print-directory oldest

# Its tests are a part of those that just ran, so there is nothing to add when .venv is of that version already.
oldest:
	@if $(python) -c 'import sys, jax; sys.exit("%d.%d" % sys.version_info[:2] + jax.__version__[:4] != "$(oldest_version)0.10")'; \
	then echo "The tests ran on Python $(oldest_version) with $(oldest_jax) already."; \
	elif ! tools/find_python.sh $(oldest_version) >/dev/null; \
	then echo "There is no working Python $(oldest_version) here: the part of the tests on $(oldest_jax) did not run."; \
	else tools/make_venv.sh .venv-oldest $(oldest_version) '$(oldest_jax)' && \
		$(oldest_python) -m pytest -q --durations=5 $(oldest_tests); \
	fi

bench: setup
	$(python) -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(python) -m pytest bench

clean:
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage .coverage.* build dist *.egg-info
	find ryzanstein_jax tests bench tools -name __pycache__ -type d -prune -exec rm -rf {} +
