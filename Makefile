# Everything sets itself up: `make test` and `make check` work on a fresh clone with Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all test-family test-web check lint types clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all,dev]'
	touch $@

demo: $(STAMP)        ## export lite0 to every format, segment the photos, write build/demo.html
	$(BIN)/pocketsam demo -o build

test: $(STAMP)        ## fast tests
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadscope --no-loadscope-reorder

test-all: $(STAMP)    ## fast and slow tests, as CI runs them
	$(BIN)/python -m pytest -m "not family and not web" -n 2 --dist loadscope --no-loadscope-reorder

test-family: $(STAMP) ## models of the family at full size in the matrix, an hour on two cores
	$(BIN)/python -m pytest -m family

test-web: $(STAMP)    ## the example for browsers in ONNX Runtime Web; npm brings the engine
	$(BIN)/python -m pytest tests/test_web.py

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/python tools/link_types.py
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf build dist .typing .mypy_cache .ruff_cache .pytest_cache *.egg-info src/*.egg-info
