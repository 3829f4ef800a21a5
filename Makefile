# make demo    the whole job on the built-in dataset and model (installs what it needs into .venv first)
# make test    linter, types and every test, the slow ones too
# make check   linter, types and the quick tests without Ray: minutes, for the working day
# make setup   only the installation; make lint, make lock: see below
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Test processes; each computes with one thread and has a Ray of its own. Three for two cores: many tests wait, for
# Ray or for a process that they kill.
TEST_JOBS ?= 3
PYTEST_ARGS ?=
PYTEST = $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test check lint setup lock clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/paretoprune demo

test: lint
	$(PYTEST) --durations=40 --durations-min=20 $(PYTEST_ARGS)

check: lint
	$(PYTEST) -m 'not slow and not ray' --durations=10 --durations-min=5 $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(STAMP)

# uv does not read pip's settings, so what pip would use is handed over: the index and the certificate bundle.
# The largest wheel is 0.5 GB: a slow connection gets the time it needs.
# Compiled once here: where PYTHONDONTWRITEBYTECODE is set (containers), every worker would compile torch anew.
UV = index="$${UV_DEFAULT_INDEX:-$${UV_INDEX_URL:-$${PIP_INDEX_URL:-$$($(BIN)/pip config get global.index-url 2>/dev/null)}}}"; \
	cert="$${SSL_CERT_FILE:-$${PIP_CERT:-$$($(BIN)/pip config get global.cert 2>/dev/null)}}"; \
	env UV_HTTP_TIMEOUT="$${UV_HTTP_TIMEOUT:-600}" \
	$${index:+UV_DEFAULT_INDEX="$$index"} $${cert:+SSL_CERT_FILE="$$cert"} $(BIN)/uv --no-progress

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed, but $(PYTHON) is %s; run: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'

$(STAMP): requirements.lock pyproject.toml | $(BIN)/uv
	@echo "installing the locked packages into $(VENV): about 7 GB with the GPU libraries, minutes on a first run"
	@$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

# Newest versions that fit pyproject.toml, for every supported Python and platform in one file; commit it once the tests pass.
lock: $(BIN)/uv
	@echo '# The versions the tests ran with, for Python 3.10 and newer. Written by: make lock' > $(VENV)/lock.new
	@$(UV) pip compile --quiet --universal --upgrade --python-version 3.10 --extra dev --extra onnx --extra openvino --extra ncnn --extra gpu --extra cluster \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml >> $(VENV)/lock.new
	@mv $(VENV)/lock.new requirements.lock

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
