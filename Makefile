# make demo: the main job on synthetic radiographs. make test: all tests. Each sets up .venv first.
.PHONY: demo test check bench soak ui docs lock setup
SHELL := bash
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# The first Python from 3.11 on; name another with make PYTHON=…
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
export PATH := $(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY ?= true

demo: setup
	@mlflow run . --env-manager local -P config=demo

# Two files at a time: torch in more processes than cores would only get in its own way. Ends with the ten slowest.
test: setup
	@python -m pytest -n 2 --dist loadfile

check: setup
	@ruff format --check .
	@ruff check .
	@pyright

bench: setup
	@python benchmarks/demo.py
	@python benchmarks/preprocess.py

# Many kills at random moments, full disks, hostile values: half an hour.
soak: setup
	@PNEUMO_KILLS=25 python -m pytest -s $$(grep -rl soak tests --include='test_*.py')

ui: setup
	@python -m pneumo_experiments ui

# The pages of docs/ as a site. Its search needs a server: python -m http.server --directory site
docs: setup
	@NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo "site/index.html"

setup: $(VENV)/ready

# A .venv that works is updated in place: what else was installed there stays.
$(VENV)/ready: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found; install one or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "setting up $(VENV) (once): torch, mlflow and what they need, several GB; 1 to 10 minutes, by the connection"
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@$(BIN)/uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock \
		|| $(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --editable .  # the command pneumo, for this folder
	@touch $@

# After a change of pyproject.toml: the lock for all platforms. It keeps the versions that it has.
lock: setup
	@uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --group dev \
		pyproject.toml -o requirements.lock
