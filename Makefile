# `make` alone prints the targets. Variables, as name=value after `make` or from the environment:
#   VENV      folder of the environment, or `none` to use PYTHON as it is and install nothing: the choice on a
#             machine or in a container that brings its own torch
#   PYTHON    interpreter that creates the environment; found if not given (Python 3.11 to 3.13)
#   PIP_ARGS  more arguments for pip, an index of CPU-only torch builds for instance
#   WORKERS   test processes at a time; auto: one a core
#   ARGS      more arguments for the command: configuration overrides for train, pytest options for tests

SHELL = /bin/bash
.DEFAULT_GOAL = help
# Byte code is kept, whatever the shell says: without, every start of Python compiles PyTorch's modules anew (6 s).
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
PYTHON ?=
PIP_ARGS ?=
ARGS =
WORKERS ?= auto

CANDIDATES = $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)
# A worker that is done takes over tests of another: xdist's default gives all of tests/distributed to the first worker.
PARALLEL = -n $(WORKERS) --dist worksteal
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --progress-bar off $(PIP_ARGS)

ifeq ($(VENV),none)
RUN = $(or $(PYTHON),python3)
GITINGEST = gitingest
else
RUN = $(VENV)/bin/python
GITINGEST = $(VENV)/bin/gitingest
ENVIRONMENT = $(VENV)/.installed
DIGEST_TOOL = $(VENV)/.gitingest
endif

.PHONY: help env train tutorial test test-fast test-gpu test-faults compat check docs digest clean

help: ## print this list
	@echo 'usage: make TARGET [VENV=folder|none] [PYTHON=interpreter] [PIP_ARGS="..."] [ARGS="..."]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1@\2/p' Makefile | while IFS=@ read -r name text; do \
		printf '  %-12s %s\n' "$$name" "$$text"; done

env: $(ENVIRONMENT) ## create the environment in VENV from requirements.txt (once)

train: $(ENVIRONMENT) ## train the sanity configuration on the sample data, on a GPU if there is one
	$(RUN) -m torch.distributed.run --standalone --nproc_per_node=1 train.py $(ARGS)

tutorial: $(ENVIRONMENT) ## run docs/tutorial.md on real cells, on a CPU too (needs the network, 59 MB)
	docs/tutorial/run.sh $(RUN) $(ARGS)

test: $(ENVIRONMENT) ## run the tests that need no GPU, the fault suite in its shortened form
	$(RUN) -m pytest $(PARALLEL) -m 'not gpu and not slow' $(ARGS)

test-fast: $(ENVIRONMENT) ## run the unit tests that start no other process
	$(RUN) -m pytest $(PARALLEL) -m 'not gpu and not slow and not process' tests/unit $(ARGS)

test-gpu: $(ENVIRONMENT) ## run the tests that need a GPU
	$(RUN) -m pytest -m gpu $(ARGS)

test-faults: $(ENVIRONMENT) ## run the full fault suite (long)
	$(RUN) -m pytest tests/faults tests/distributed/test_checkpoint_dcp.py tests/distributed/test_signals.py $(ARGS)

compat: $(ENVIRONMENT) ## load an export in other releases of transformers (needs the network, 1 GB each)
	$(RUN) -m tests.compat.run $(ARGS)

check: $(ENVIRONMENT) ## check format, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

docs: $(ENVIRONMENT) ## write the tables of docs/configuration.md from the code and hydra_config/
	$(RUN) -m docs.make_configuration

digest: $(DIGEST_TOOL) ## write internal/gitingest.txt, the repository as one text file
	@internal/digest.sh $(GITINGEST)

clean: ## remove caches and build leftovers; checkpoints and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -name .git -o -name .venv \) -prune -o -name __pycache__ -prune -exec rm -r {} +

# The stamps are written last: an interrupted installation is taken up again by the next call. Byte code is made when a
# module is imported first: that of all modules takes longer than the rest of the installation, for the few that are used.
$(VENV)/.installed: requirements.txt pyproject.toml
	@set -euo pipefail; \
	python=; \
	for name in $(CANDIDATES); do \
		if "$$name" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null; \
		then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'No Python 3.11, 3.12 or 3.13 with the venv module among: $(CANDIDATES).' >&2; \
		echo 'Install one, or name it: make PYTHON=path/to/python' >&2; \
		exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$python" --version): a few minutes, 2 GB (with CUDA more)"; \
	if "$$python" -c 'import ensurepip' 2> /dev/null; then \
		"$$python" -m venv $(VENV); \
	else \
		"$$python" -m venv --without-pip $(VENV); \
		"$$python" -m pip --python $(RUN) install --quiet pip; \
	fi; \
	$(RUN) $(PIP_INSTALL) --no-compile --requirement requirements.txt
	$(RUN) $(PIP_INSTALL) --no-deps --editable .
	@touch $@

$(VENV)/.gitingest: $(VENV)/.installed
	@echo 'Installing gitingest into $(VENV)'
	@$(RUN) $(PIP_INSTALL) --constraint requirements.txt gitingest==0.3.1
	@touch $@
