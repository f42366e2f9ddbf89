# Everything a newcomer needs: `make demo`, `make test`. PYTHON must be 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint collect pytest lock audit clean

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "knet needs Python 3.11 or newer, found " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	$(BIN)/uv pip sync --python $(BIN)/python --quiet --require-hashes requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --editable .
	touch $@

demo: setup
	cluster/demo.sh

# Looking for tests compiles what they import, on the core that mypy leaves: else each runner would compile it.
test: setup
	$(MAKE) --jobs=2 lint collect
	$(MAKE) pytest

collect: setup
	$(BIN)/python -m pytest --collect-only --quiet --quiet

# Tests wait for processes of their own: long enough for one runner more than cores.
pytest: setup
	$(BIN)/python -m pytest --numprocesses 3 --dist loadgroup

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known vulnerabilities of the locked packages, by the package index's advisories. Out of their reach nothing is
# audited, which pip-audit alone would call success: --strict makes it fail.
audit: setup
	$(BIN)/uv tool run pip-audit@2.10.1 --strict --requirement requirements.lock --disable-pip --require-hashes \
		|| { echo "audit: failed: above are vulnerable packages, or those that could not be audited" >&2; exit 1; }

lock:
	$(BIN)/uv pip compile pyproject.toml --group dev --python-version 3.11 --generate-hashes \
		--no-header --no-emit-index-url --quiet --output-file requirements.lock

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
