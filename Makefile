# make demo: set up, distil a real Transformer into a Mamba and reload it.   make test: set up and run the tests.
# make lint: style.   TORCH selects the torch build, e.g. `make test TORCH=torch` for the CUDA build.

VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/python train_cab.py training_args/quickstart_lm.yaml

test: $(READY) lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first and alone: a range would let the package's own requirement choose another build.
$(READY): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,peft,test]"
	touch $(READY)

clean:
	rm -rf $(VENV) .cache outputs
