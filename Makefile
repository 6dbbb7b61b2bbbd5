# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Many tests wait for clusters: three at a time keep two cores busy.
WORKERS ?= 3

.PHONY: demo test test-node-trainer check format crds clean help

help:
	@echo "make demo    run the main job end to end on this machine, with real data"
	@echo "make test    run all tests; the cluster tests on a real API server too, where one is found"
	@echo "make test-node-trainer   build the trainer's image, and test it in containers (root, Debian)"
	@echo "make check   lint, types, layers, and whether generated files are up to date"
	@echo "make format  format the code"
	@echo "make crds    generate crds/ and the chart's copy from the models"

demo: $(VENV)/.installed
	$(BIN)/dpmoe demo $(DEMO_ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-node-trainer: $(VENV)/.installed
	$(BIN)/python -m pytest tests/node -m trainer_image $(PYTEST_ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(BIN)/python -m dpmoe_operator.cli.main crds --check crds --check helm/dpmoe/files/crds

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

crds: $(VENV)/.installed
	$(BIN)/dpmoe crds --output crds --output helm/dpmoe/files/crds

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dpmoe needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-runs .pytest_cache .mypy_cache .ruff_cache
