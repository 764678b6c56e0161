# Every target makes .venv from the committed uv.lock first. All that a machine needs is Python 3.11 (3.12 and 3.13
# do too), make and the network: where there is no uv, a private one goes to .cache/uv.

.DEFAULT_GOAL := help
.NOTPARALLEL:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
# Run it: a pyenv shim for a uv that is not there is found in PATH too.
UV := $(or $(shell uv --version >/dev/null 2>&1 && command -v uv),.cache/uv/bin/uv)
BIN := .venv/bin
ARGS ?=

.PHONY: help
help: ## say what there is
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1	\2/p' Makefile | expand -t 16
	@echo 'options go in ARGS: make demo ARGS="--seconds 60", make unit ARGS="tests/test_config.py -k secret"'

.PHONY: demo
demo: .venv/synced ## a real Kafka, real series, the daemon, live in this terminal
	$(BIN)/forecaster demo $(ARGS)

.PHONY: test
test: lint types unit try-wheel ## all that must hold: lint, types, unit, try-wheel

.PHONY: lint
lint: .venv/synced ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.PHONY: types
types: .venv/synced ## mypy, strict
	$(BIN)/mypy

.PHONY: unit
unit: .venv/synced ## pytest, the integration tests on a real Kafka too
	$(BIN)/python -m pytest $(ARGS)

.PHONY: test-deploy
test-deploy: .venv/synced ## the daemon among its neighbours: Prometheus, Alertmanager, dashboards, units, images
	$(BIN)/python -m pytest -m deploy $(ARGS)

.PHONY: try-wheel
try-wheel: wheel ## the built wheel in an empty environment, away from the source tree
	UV='$(UV)' .ci/try-wheel dist/*.whl

.PHONY: wheel
wheel: .venv/synced ## dist/*.whl
	rm -rf dist
	$(UV) build --quiet --wheel
	@ls dist/*.whl

.PHONY: sbom
sbom: .venv/synced ## dist/sbom.cdx.json: all that the daemon and its extras bring along, with hashes, from uv.lock
	mkdir -p dist
	$(UV) export --frozen --quiet --no-dev --all-extras --format cyclonedx1.5 --output-file dist/sbom.cdx.json >/dev/null
	@ls dist/sbom.cdx.json

.PHONY: release
release: wheel sbom ## what a release is made of: the wheel, the bill of materials, their checksums
	cd dist && sha256sum -- * > SHA256SUMS && cat SHA256SUMS

.PHONY: audit
audit: .venv/synced ## known vulnerabilities of what uv.lock names; asks PyPI's advisories, so it needs that network
	mkdir -p .cache
	$(UV) export --frozen --quiet --no-dev --all-extras --no-emit-project --output-file .cache/audit.txt >/dev/null
	$(UV) tool run --from 'pip-audit>=2.9' pip-audit --requirement .cache/audit.txt --require-hashes --disable-pip --strict

# Five minutes on two quiet cores: what has changed. The figures of the documents are each benchmark's own defaults.
BENCH_throughput := --rounds 1 --records 100000
BENCH_latency := --rounds 1 --seconds 15
BENCH_peers := --rounds 1 --records 100000 --only daemon,quix,bytewax

.PHONY: bench
bench: .venv/synced ## rates, latency, ratios to the peers; ONE=peers for one of them whole, JSON=directory for the results
	$(foreach each,$(or $(ONE),throughput latency peers),echo '== $(each)'; UV='$(UV)' $(BIN)/python benchmarks/$(each).py \
		$(if $(ONE),,$(BENCH_$(each))) $(if $(JSON),--json "$(JSON)/$(each).json") $(ARGS) || missed=1;) \
		exit $${missed:-0}

.PHONY: chaos
chaos: .venv/synced ## 200,000 records through 30 kills and 6 swaps of weights a run, rows flushed every 10 s, then always; ARGS="--client librdkafka"
	$(BIN)/python tests/chaos/simulation.py --seeds 2000
	$(BIN)/python tests/chaos/storm.py --capacity 256 $(ARGS)
	$(BIN)/python tests/chaos/storm.py --seed 2 --flush-interval-s 0 $(ARGS)

.PHONY: soak
soak: .venv/synced ## 20 minutes at 2,000 records/s, streams coming and going; ARGS="--minutes 3" for a look
	$(BIN)/python benchmarks/soak.py $(ARGS)

.PHONY: clean
clean: ## remove all that make has made here
	rm -rf .venv .cache dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find forecaster tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/synced: uv.lock pyproject.toml | $(UV)
	$(UV) sync --frozen
	touch $@

.cache/uv/bin/uv:
	$(PYTHON) -m venv .cache/uv
	.cache/uv/bin/python -m pip install --quiet 'uv>=0.8,<1'
