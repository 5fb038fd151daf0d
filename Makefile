# make demo   sets up .venv, trains the demo on real data, prints a table, writes a picture
# make test   sets up .venv, runs all tests
# make check  ruff, types, docs
# make docs   builds the documentation into site/
# make bench  sets up .venv-bench with other libraries, measures averages beside theirs
# make clean  removes what the others made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# torch's own threads and as many workers as cores would fight over them.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: demo test check docs bench clean
.DEFAULT_GOAL := test

demo: $(VENV)/.demo
	$(BIN)/python examples/digits_diffusion $(ARGS)

test: $(VENV)/.test
	$(TEST_ENV) $(BIN)/python -m pytest -q -n auto $(ARGS)

check: export NO_MKDOCS_2_WARNING=1
check: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/.check
	$(BIN)/mkdocs build --strict

bench: .venv-bench/.bench
	.venv-bench/bin/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) .venv-bench site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python 3.10 or later is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) torch -e '.[demo]'
	touch $@

# mmagic's dependencies pin packages that no longer exist, timm's torchvision does not import beside
# the CPU build of torch; only single files of theirs are read.
$(VENV)/.test: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) torch -e '.[cli,demo,peers,test]'
	$(PIP) --no-deps mmagic timm
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(PIP) -e '.[docs,lint]'
	touch $@

# The pins of torch hold here too, and the peers' own dependencies must not move them.
.venv-bench/.bench: pyproject.toml constraints.txt benchmarks/requirements.txt benchmarks/requirements-alone.txt
	$(PYTHON) -m venv .venv-bench
	echo '*' > .venv-bench/.gitignore
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e . -r benchmarks/requirements.txt
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps -r benchmarks/requirements-alone.txt
	touch $@
