# make serve           set everything up and serve a small model with KV retrieval (MODEL=needle MODEL=folder PORT=30001)
# make test            set everything up and run the tests       (PYTEST_FLAGS="-k radix")
# make test-release    the tests on another release of SGLang, in an environment of its own (SGLANG=0.5.17)
# make compile-kernels the kernels, for every supported GPU; the tests compile for one
# make accuracy        methods, budgets and tasks through the server (ACCURACY_FLAGS="--tasks single --count 4")
# make accuracy-quick  the part of it that is in the tests
# make real-model      real text under retrieval, by a real model, half an hour  (REAL_MODEL_FLAGS="--model FOLDER")
# make suites          RULER, lm-eval and SGLang's own suites on both, an hour   (SUITES_FLAGS="ruler --samples 16 8")
# make train-model     train the small model again, an hour       (OUT=folder)
# make bench           traffic on plain SGLang and FreeKV, an hour (BENCH_FLAGS="--dataset-path chats.json")
# make bench-quick     the same with small workloads, some minutes
# make bench-programs  frontend programs on both, in batch        (PROGRAMS_FLAGS=--quick)
# make cost-model      predicted and measured decode steps, plans for other machines
# make soak            half an hour of mixed traffic              (SOAK_FLAGS="--minutes 5")
# make soak-quick      the part of it that is in the tests
# make fuzz            a million steps of the memory side         (FUZZ_FLAGS="--minutes 10 --seed 7")
# make compatibility   what other releases of SGLang have of what this relies on (WHEELS="a.whl b.whl")
# make gpu-suite       tests and numbers that need a GPU          (SUITE_FLAGS=--rehearse: without one)
# make lint, make clean

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help serve test test-release compile-kernels accuracy accuracy-quick real-model suites train-model bench bench-quick \
    bench-programs cost-model soak soak-quick fuzz compatibility gpu-suite lint clean

# The first that runs and is recent enough.
PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
# smollm2, a language model of 93 MB from the package index; needle, the shipped model that finds facts; or a folder.
MODEL ?= smollm2
HOST ?= 127.0.0.1
PORT ?= 30000
# More flags of the server; they come after those with which tools/demos.py shows smollm2 and needle.
SERVE_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
SUITE_FLAGS ?=
SUITES_FLAGS ?=
REAL_MODEL_FLAGS ?=
SOAK_FLAGS ?= --minutes 30 --out benchmarks/results/soak.jsonl
FUZZ_FLAGS ?= --out benchmarks/results/fuzz.jsonl
PROGRAMS_FLAGS ?=
WHEELS ?=
# A release of SGLang to install instead of the newest that pyproject.toml allows.
SGLANG ?=
ACCURACY_FLAGS ?= --resume
OUT ?= build/needle/model
# The environment takes 11 GB with the newest release, and the downloads as much again for a moment.
MIN_FREE_GB ?= 24

RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

serve: $(INSTALLED)
	@$(RUN) -m tools.serve --model-path $(MODEL) --host $(HOST) --port $(PORT) $(SERVE_FLAGS)

test: $(INSTALLED)
	$(RUN) -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder --durations=15 $(PYTEST_FLAGS)

test-release:
	@test -n "$(SGLANG)" || { echo "make: name a release: make test-release SGLANG=0.5.17" >&2; exit 1; }
	@FREEKV_TRY_SGLANG=$(SGLANG) $(MAKE) test VENV=.venv-$(SGLANG) SGLANG=$(SGLANG)

compile-kernels: $(INSTALLED)
	FREEKV_ALL_GPUS=1 $(RUN) -m pytest -q tests/kernels/test_compile.py

accuracy: $(INSTALLED)
	$(RUN) -m benchmarks.accuracy $(ACCURACY_FLAGS)
	$(RUN) -m benchmarks.tables

accuracy-quick: $(INSTALLED)
	$(RUN) -m pytest -q tests/server/test_accuracy_quick.py

real-model: $(INSTALLED)
	$(RUN) -m benchmarks.real_model $(REAL_MODEL_FLAGS)
	$(RUN) -m benchmarks.tables

suites: $(INSTALLED)
	$(RUN) -m benchmarks.suites $(SUITES_FLAGS)
	$(RUN) -m benchmarks.tables

train-model: $(INSTALLED)
	$(RUN) -m benchmarks.needle --out $(OUT)

bench: $(INSTALLED)
	$(RUN) -m benchmarks.throughput --ablations $(BENCH_FLAGS)
	$(RUN) -m benchmarks.tables

bench-quick: $(INSTALLED)
	$(RUN) -m benchmarks.throughput --quick $(BENCH_FLAGS)

cost-model: $(INSTALLED)
	$(RUN) -m benchmarks.cost_model
	$(RUN) -m benchmarks.tables

soak: $(INSTALLED)
	$(RUN) -m tools.soak $(SOAK_FLAGS)

soak-quick: $(INSTALLED)
	$(RUN) -m pytest -q -s tests/server/oracles/test_soak_quick.py

fuzz: $(INSTALLED)
	$(RUN) -m tools.fuzz $(FUZZ_FLAGS)

bench-programs: $(INSTALLED)
	$(RUN) -m benchmarks.programs $(PROGRAMS_FLAGS)
	$(RUN) -m benchmarks.tables

compatibility: $(INSTALLED)
	$(RUN) -m tools.sglang_releases.compatibility --write $(WHEELS)

gpu-suite: $(INSTALLED)
	$(RUN) -m benchmarks.gpu $(SUITE_FLAGS)

lint: $(INSTALLED)
	@$(RUN) -m ruff --version >/dev/null 2>&1 || $(RUN) -m pip install -q ruff
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) models build *.egg-info .pytest_cache .hypothesis .ruff_cache

$(INSTALLED): pyproject.toml
	@$(CHECK_MACHINE)
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "make: $(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(WATCH_INSTALL)
	@touch $@

# pip refuses a release that pyproject.toml excludes; one on trial goes without the check.
define INSTALL
if test -z "$(SGLANG)"; then $(RUN) -m pip install --progress-bar off -e '.[test]'; \
else $(RUN) -m pip install --progress-bar off "sglang==$(SGLANG)" $$($(PYTHON) -c "import tomllib; print(*(p.replace(' ', '') \
    for p in tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['test']))") && \
    $(RUN) -m pip install --progress-bar off --no-deps -e .; fi
endef

define CHECK_MACHINE
test -n "$(PYTHON)" || { \
    echo "make: no Python 3.11 or later found; install one (Debian: apt install python3 python3-venv)" \
         "or name it: make PYTHON=..." >&2; exit 1; }; \
mkdir -p $(VENV); free=$$(df --output=avail -BG $(VENV) | tail -1 | tr -dc 0-9); \
test -s $(VENV)/install.log || test "$$free" -ge $(MIN_FREE_GB) || { \
    echo "make: $$free GB free on this disk, the installation needs $(MIN_FREE_GB) GB;" \
         "free some, or choose another place: make VENV=..." >&2; exit 1; }
endef

# pip shows its bars on a terminal only, and falls silent while it unpacks: show time, size and its last line.
define WATCH_INSTALL
log=$(VENV)/install.log; \
echo "Installing SGLang and PyTorch into $(VENV): about 11 GB, some minutes (messages in $$log)"; \
{ $(INSTALL); } >$$log 2>&1 & pip=$$!; \
trap 'kill $$pip 2>/dev/null || true' INT TERM; \
start=$$SECONDS; before=$$(df --output=avail -m $(VENV) | tail -1); \
if [ -t 1 ]; then end='\r'; every=1; else end='\n'; every=15; fi; \
while kill -0 $$pip 2>/dev/null; do \
    seconds=$$((SECONDS - start)); after=$$(df --output=avail -m $(VENV) | tail -1); \
    printf "  %02d:%02d  %6d MB  %-60.60s$$end" $$((seconds / 60)) $$((seconds % 60)) $$((before - after)) \
        "$$(tail -1 $$log)"; \
    sleep $$every; \
done; \
wait $$pip || { printf '\n'; tail -20 $$log; echo "make: the installation failed; all messages: $$log" >&2; exit 1; }; \
printf '\n  installed in %d s\n' $$((SECONDS - start))
endef
