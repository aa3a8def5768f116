# Every target makes the virtual environment it needs: nothing is to be installed by hand.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One more than there are cores: many tests wait.
WORKERS := $(shell expr $$(nproc) + 1)

# Tests start hundreds of processes: each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup docs demo test test-slow test-slow-compute test-slow-timed test-real engines check bench fidelity lengths numbers shifts arena evaluation loop soak fuzz lock clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: $(STAMP)
	$(BIN)/throttllem demo --out out/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(or $(WORKERS),auto)

# Minutes of computing, which other work may slow down, and tests against the clock, which it may not.
COMPUTE := tests/calibrate tests/fidelity tests/report tests/reproduce $(wildcard tests/test_*.py)
COMPUTE := $(wildcard $(COMPUTE))

test-slow: test-slow-compute test-slow-timed

test-slow-compute: $(STAMP)
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n auto tests/core/test_controller_machine.py
	$(BIN)/python -m pytest -n auto -m slow $(COMPUTE)

test-slow-timed: $(STAMP)
	$(BIN)/python -m pytest -n auto -m slow $(addprefix --ignore=,$(COMPUTE)) tests

# Real engines, pinned, each in an environment of its own: about 3 GB. ENGINES="vllm triton" names some only.
# It needs no virtual environment of the project: both can be made at once.
engines:
	$(PYTHON) -m tools.testbed.engines $(ENGINES) --into .engines

test-real: $(STAMP)
	$(BIN)/python -m pytest -m real tests/real

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

# The documentation as a site in out/site: offline, and strict (a broken link is an error).
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python bench/bench.py $(BENCH)
	$(BIN)/python -m bench.gateway
	$(BIN)/python -m bench.request_path

fidelity: $(STAMP)
	$(BIN)/python -m tools.fidelity $(FIDELITY)

lengths: $(STAMP)
	$(BIN)/python -m tools.lengths $(LENGTHS)

# The simulated figures of docs and README: savings, bias of the savings estimate, the paper's claims. About 20 minutes.
numbers: $(STAMP)
	$(BIN)/python -m tools.numbers $(NUMBERS)

# Policies, rivals and a clairvoyant on the judging grid: docs/evaluation/arena.md. ARENA="--seeds 1" runs less of it.
arena: $(STAMP)
	$(BIN)/throttllem arena --grid judging --out out/arena --document docs/evaluation/arena.md $(ARENA)

# Simulated shifts of load, lengths, engine and GPU under learned margins: docs/evaluation/guarantee.md. About half an hour.
shifts: $(STAMP)
	$(BIN)/python -m tools.shifts $(SHIFTS)

# The gateway in front of the real engines of `make engines`: about an hour. EVALUATION="--only clients" runs some of it.
evaluation: $(STAMP)
	$(BIN)/python -m tools.evaluation $(EVALUATION)

# The whole loop on a real engine and a fake GPU, its clocks set for real: about 40 minutes; needs `make engines`.
loop: $(STAMP)
	$(BIN)/python -m tools.loop $(LOOP)

# Faults by the thousand against the keeper of clocks: about 35 minutes. SOAK="--schedules 2000" runs fewer.
soak: $(STAMP)
	$(BIN)/python -m tools.soak $(or $(SOAK),--schedules 10000)

# Properties of everything that reads what others wrote, for an hour. FUZZ="--minutes 10 streams" runs less of it.
fuzz: $(STAMP)
	$(BIN)/python -m tools.fuzz $(FUZZ)

lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --extra all --extra dev --extra docs pyproject.toml -o requirements.lock

clean:
	rm -rf .venv out build src/*.egg-info
