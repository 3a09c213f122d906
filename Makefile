# make loop: set up if missing, prepare data, run the research loop.  make test: set up if missing, run every test.
PYTHON ?= python3
BIN := .venv/bin
MAX ?= 10

.PHONY: loop test lint clean

loop: .venv/ready
	$(BIN)/python -m oracle.prepare
	$(BIN)/pytest --autoresearch-loop --autoresearch-max $(MAX) || test $$? -eq 1  # 1: some candidate crashed

test: .venv/ready
	$(BIN)/python -m oracle.prepare --profile tiny
	$(BIN)/pytest -n 2 --dist loadfile --ignore=tests/laws
	$(BIN)/pytest --autoresearch-laws
	$(BIN)/pytest --autoresearch-lock=check
	$(BIN)/pytest --autoresearch-determinism -o autoresearch_budget_s=5
	$(BIN)/mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
