# The front door: every target makes .venv first, from a fresh clone and without a step by hand.

VENV ?= .venv
PYTHON ?= python3
# cpu or cuda; what .venv was made for stays in force until another device is named
DEVICE ?= $(or $(patsubst $(VENV)/.installed-%,%,$(wildcard $(VENV)/.installed-*)),cpu)
STAMP := $(VENV)/.installed-$(DEVICE)
RUN := $(VENV)/bin/python -m

.PHONY: setup demo test lint compat bench clean

setup: $(STAMP)

demo: setup
	$(RUN) examples.demo

test: setup
	$(RUN) pytest -n 2 --dist loadgroup --no-loadscope-reorder

lint: setup
	$(RUN) ruff format --check
	$(RUN) ruff check
	$(RUN) mypy vllm_armt examples tests .ci/compat.py

# make compat VLLM=0.33.0 [TESTS="tests/engine -x"]: tests against another version of vLLM than the one installed
compat: setup
	$(VENV)/bin/python .ci/compat.py $(VLLM) $(TESTS)

bench: setup
	$(VENV)/bin/vllm-armt bench schedule
	$(VENV)/bin/vllm-armt bench documents --documents 1,4,16 --beside 0
	$(VENV)/bin/vllm-armt bench decode --requests 1,8,32
	$(VENV)/bin/vllm-armt bench attention --tokens 1024,4096,16384

clean:
	rm -rf $(VENV) models build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml .ci/setup patches/vllm_dist_name.py
	.ci/setup $(PYTHON) $(VENV) $(DEVICE)
	touch $@
