# Two commands do all the set-up: `make demo` and `make test`. Both need bare Python 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt

# make demo TOY=1: a small CNN on digits, trained here. make demo PHOTOS=folder: the real network on photographs of yours.
TOY ?=
PHOTOS ?=
# make demo WEIGHTS=... MODEL=... DATA=...: the same on real weights
WEIGHTS ?=
MODEL ?=
LIBRARY ?= pytorchcv
DATA ?=
CALIBRATION ?=
BITS ?= [8,4]

# Other quantizers that ours is measured beside, each in an environment of its own.
PEERS := brevitas model-compression-toolkit aimet-torch nncf torchao

.PHONY: demo dist docs wheels test check lint test-slow test-gpu fuzz mutation bench bench-cluster zoo-survival sweep tables peers clean help

help:
	@echo "make demo       quantize an ImageNet network, publish, pull and switch it as a device (PHOTOS=, TOY=1, WEIGHTS= MODEL= DATA=)"
	@echo "make test       lint, types, imports, tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make fuzz       a minute of coverage-guided fuzzing"
	@echo "make mutation   mutants of a package, each against the tests that cover it (PACKAGE= MUTANTS=150 MINUTES=60 SEED=1)"
	@echo "make zoo-survival   24 architectures on a cluster of three nodes, killed twice and finished (15 minutes)"
	@echo "make bench-cluster  what the cluster costs, from 1 M to 1 B weights"
	@echo "make docs       the documentation site, strictly, into build/site"
	@echo "make dist       wheel and sdist, installed into empty environments and tried; make wheels: are there wheels everywhere?"
	@echo "make bench      speed and memory of the method; make tables: the tables of README.md and docs/"
	@echo "make sweep      which weights of every architecture of timm and pytorchcv have data; each through a job (MINUTES=60)"
	@echo "make peers      top-1 beside other quantizers at INT4 and INT8 weights (builds their environments; hours)"

# Compiled to byte code at once: uv leaves that to the first import, and where PYTHONDONTWRITEBYTECODE is set to every one.
$(BIN)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; say make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) uv
	@echo "installing into $(VENV): torch, ray, timm and what they need (2 GB, a minute or so)"
	$(BIN)/uv pip install --python $(BIN)/python --constraint $(CONSTRAINTS) --compile-bytecode --editable '.[dev]'
	touch $@

demo: $(BIN)/.ready
	$(BIN)/python -m jobs.cli.demo --toy '$(TOY)' --photographs '$(PHOTOS)' --weights '$(WEIGHTS)' --library '$(LIBRARY)' --model '$(MODEL)' --data '$(DATA)' --calibration '$(CALIBRATION)' --bits '$(BITS)'

test: $(BIN)/.ready lint
	$(BIN)/python -m pytest -m 'not slow and not gpu'

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-slow: $(BIN)/.ready
	$(BIN)/python -m pytest -m slow --timeout 3600

test-gpu: $(BIN)/.ready
	$(BIN)/python -m pytest -m gpu

# Coverage-guided fuzzing of everything that a device parses; a minute, bounded memory.
fuzz: $(BIN)/.ready
	@echo "installing into $(VENV): torch, ray, timm and what they need (2 GB, a minute or so)"
	$(BIN)/uv pip install --python $(BIN)/python --constraint $(CONSTRAINTS) --compile-bytecode --editable '.[dev,fuzz]'
	$(BIN)/python -m tests.fuzz.run -max_total_time=60 -rss_limit_mb=2048 -timeout=10

# A sample of mutants of a package or folders, goes on where it stopped; AGAIN=--again tries the survivors once more.
PACKAGE ?= nestquant
MUTANTS ?= 150
SEED ?= 1
AGAIN ?=
MINUTES ?= 60
mutation: $(BIN)/.ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint $(CONSTRAINTS) --compile-bytecode --editable '.[dev,mutation]'
	$(BIN)/python -m pytest -q tests/mutation
	$(BIN)/python -m tests.mutation.run $(PACKAGE) --mutants $(MUTANTS) --minutes $(MINUTES) --seed $(SEED) $(AGAIN)

# Strict: a link that leads nowhere, or a name that the code lacks, fails. NO_MKDOCS_2_WARNING: its notice is not ours.
docs: $(BIN)/.ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint $(CONSTRAINTS) --compile-bytecode --editable '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/python -m tests.site build/site

# Wheel and sdist, each installed into an empty environment, where the tutorial runs.
dist: $(BIN)/.ready
	rm -rf dist
	$(BIN)/uv build --quiet --out-dir dist
	$(BIN)/python -m tests.release dist dist

# Does the resolver find wheels of everything pinned, for Python 3.11 to 3.14 on x86-64 and aarch64?
wheels: $(BIN)/.ready
	$(BIN)/python -m tests.release wheels

bench: $(BIN)/.ready
	$(BIN)/python -m tests.benchmarks.bench_rounding
	$(BIN)/python -m tests.benchmarks.bench_packing
	$(BIN)/python -m tests.benchmarks.bench_modules

# Tasks, jobs, workers and requests: minutes. Growth with the model: half an hour, 12 GB of memory, 16 GB of disk.
bench-cluster: $(BIN)/.ready
	$(BIN)/python -m tests.benchmarks.bench_cluster
	$(BIN)/python -m tests.benchmarks.bench_scale

# A zoo on three nodes, killed twice: needs the test data (NESTQUANT_TEST_DATA); fails where a promise does not hold.
zoo-survival: $(BIN)/.ready
	$(BIN)/python -m tests.benchmarks.zoo_survival --write

# Every architecture of timm and pytorchcv up to 30 M weights; goes on where it stopped. Hours in all: MINUTES= bounds one sitting.
sweep: $(BIN)/.ready
	$(BIN)/python -m tests.benchmarks.sweep --survey --minutes $(MINUTES)
	$(BIN)/python -m tests.benchmarks.sweep --minutes $(MINUTES)

tables: $(BIN)/.ready
	$(BIN)/python -m tests.benchmarks.accuracy_table
	$(BIN)/python -m tests.benchmarks.size_table
	$(BIN)/python -m tests.benchmarks.readme_tables

.peers/%/.ready: tests/benchmarks/peers-%.txt $(BIN)/.ready
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .peers/$*
	$(BIN)/uv pip install --quiet --python .peers/$*/bin/python --requirement $<
	touch $@

peers: $(BIN)/.ready $(PEERS:%=.peers/%/.ready)
	$(BIN)/python -m tests.benchmarks.peers

clean:
	rm -rf $(VENV) .peers .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
