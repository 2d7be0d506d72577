# Two commands need nothing but git, make and python3 (3.11 or newer, with venv):
#   make demo   trains a student on drawings, evaluates and exports it, in about ten minutes
#   make test   runs the tests; make test-slow those that start whole runs many times
# make bench-laptop compares UTA with other methods, for hours (QUICK=1: minutes; TABLE=1: what is there).
# And make faults kills training runs 56 times and checks what they come back to (QUICK=1: 10 times).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
DATA ?= data/emoji_scenes

.PHONY: demo test test-slow faults bench-laptop lint format clean

# The stamp is renewed when the requirements change.
$(VENV)/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "uta-jax needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Installing into $(VENV), once (PyTorch, which checks the exports, is most of it) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[torch,dev]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/uta-jax data emoji_scenes --out=$(DATA)
	$(BIN)/uta-jax train --config=configs/demo.py --workdir=$(RUN) \
	  --config.data.path=$(DATA) --config.eval.path=$(DATA)
	$(BIN)/uta-jax export --workdir=$(RUN) --format=hf --out=$(RUN)/exported --overwrite
	$(BIN)/uta-jax evaluate --workdir=$(RUN) --exported=$(RUN)/exported --json=$(RUN)/evaluate.json
	$(BIN)/uta-jax report $(RUN)

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

faults: $(VENV)/installed
	$(BIN)/python tests/faults/harness.py $(if $(QUICK),--quick)

bench-laptop: $(VENV)/installed
	$(BIN)/uta-jax data emoji_scenes --out=$(DATA)
	$(BIN)/python tests/benchmarks/laptop.py --data=$(DATA) $(if $(QUICK),--quick) $(if $(TABLE),--table)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info
