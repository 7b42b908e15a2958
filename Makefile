# make demo: set up, distil a real Transformer into a Mamba and reload it.   make test: set up and run the tests.
# make lint: style, and who imports whom.   make docs: the documentation site, into site/.
# TORCH selects the torch build, e.g. `make test TORCH=torch` for the CUDA build.

VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SITE := build/docs

.PHONY: demo test lint docs clean

demo: $(READY)
	$(BIN)/python train_cab.py training_args/quickstart_lm.yaml

test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

# The site's pages are the files that the repository shows, in the same places, so that their links hold in both.
docs: $(VENV)-docs/.ready
	rm -rf $(SITE) && mkdir -p $(SITE)/benchmarks
	cp -r docs CONTRIBUTING.md LICENSE CITATION.cff $(SITE) && cp README.md $(SITE)/index.md
	cp -r benchmarks/*.md benchmarks/quality benchmarks/speed $(SITE)/benchmarks
	$(VENV)-docs/bin/zensical build --strict --clean >build/docs.log 2>&1; status=$$?; cat build/docs.log; exit $$status
	! grep --quiet "^griffe:" build/docs.log

# The pages are read out of the source: neither torch nor the package is installed.
$(VENV)-docs/.ready: docs/requirements.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --requirement docs/requirements.txt
	touch $@

# torch first and alone: a range would let the package's own requirement choose another build.
$(READY): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,peft,test]"
	touch $(READY)

clean:
	rm -rf $(VENV) $(VENV)-docs .cache build outputs site
