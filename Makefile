# Two commands matter: `make report` and `make test`. `make` lists the rest.
#
# Settings, all optional:
#   PROFILE=quick|full   DATA=DIR   SET="key=value ..."   JOBS=N   FORCE=1   (report)
#   GPU=1                the CUDA build of TensorFlow in place of tensorflow-cpu (every target)
#   PYTHON=python3.11    the Python that the environment is made of

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help report test lab lint demo lock readme clean

PROFILE ?= quick
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12; do $$p -c 'import venv' 2>/dev/null && echo $$p && break; done)
# named by the lock's content: a new lock, and nothing else, installs again
STAMP := $(VENV)/.installed-$(shell sha256sum requirements.lock | cut -c1-12)$(if $(GPU),-gpu)

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

report: $(STAMP) ## run what is due of the study; report and models (PROFILE= DATA= SET= JOBS=)
	@$(BIN)/hematovision report --profile "$(PROFILE)" $(if $(DATA),--data "$(DATA)") \
	  $(foreach pair,$(SET),--set '$(pair)') $(if $(JOBS),--jobs $(JOBS)) $(if $(FORCE),--force)

test: $(STAMP) ## run the tests (PYTEST="-m 'not slow'" for the quick ones)
	@$(BIN)/python -m pytest $(PYTEST)

lab: $(STAMP) ## open the notebooks in JupyterLab
	@$(BIN)/python -m ipykernel install --prefix $(VENV) --name hematovision --display-name HematoVision >/dev/null
	@$(BIN)/jupyter lab --notebook-dir notebooks $(LAB)

lint: $(STAMP) ## check style, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

demo: $(STAMP) ## start the web demo of the final model (PORT=)
	@$(BIN)/hematovision demo $(if $(PORT),--port $(PORT))

lock: $(STAMP) ## resolve pyproject.toml again: requirements.lock and environment.yml
	@$(BIN)/python -m pip install --quiet uv
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/lock.py $(LOCK)

readme: $(STAMP) ## write the README's tables again from the published report
	@$(BIN)/python -m hematovision.report.page

clean: ## remove what can be made again: environment, caches, unpublished runs
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .doit* data/cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(STAMP):
	@if [ -z "$(PYTHON)" ]; then \
	  echo "hematovision: there is no Python 3.11 or 3.12 here: install one, or name it with PYTHON=PATH" >&2; exit 2; fi
	@echo "setting up $(VENV) (once; about 2 GB, a few minutes)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(if $(GPU),$(BIN)/python tools/gpu.py)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.installed-*
	@touch $(STAMP)
