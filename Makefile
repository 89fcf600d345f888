# One line of intent each. `make demo` and `make test` install what they need.
PYTHON ?= python3
BIN := .venv/bin
FLASH := $(BIN)/flash-experts
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-peers learn docs lint audit bench install wheels clean

demo: .venv/.installed  ## real cards, a small MoE fine-tuned on them, compared, and names
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh scripts/demo.sh

test: .venv/.installed-dev  ## all tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal

test-peers: .venv/.installed-dev  ## transformers' own tests of models, on ours, with GPT-2 as the control
	$(ONE_THREAD) $(BIN)/python -m pytest -o addopts=-ra -n 2 --dist worksteal tests/test_models/transformers_mixin.py

learn: .venv/.installed-dev  ## every chapter of the learning path and its solutions, as scripts; one as a notebook
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m "not gpu" tests/test_learn.py tests/test_notebooks.py

docs: .venv/.installed-dev  ## the site, in build/site, with the chapters as notebooks: those that changed are run for it
	@$(BIN)/python scripts/stage_docs.py --run && $(BIN)/zensical build --strict

lint: .venv/.installed-dev  ## style, types (scripts and benchmarks too), import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: .venv/.installed-dev  ## known weaknesses of the pinned packages, asked of the advisory databases
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	.venv/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict

bench: .venv/.installed-dev  ## the measurements of the README, ours and the baselines, in one run
	@$(FLASH) benchmark all

wheels: .venv/bin/python  ## flash-experts and flash-experts-models as wheels, in dist
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w dist . distributions/models && ls dist

install: .venv/.installed-dev  ## the virtual environment with everything

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv (PyTorch and its friends: one to three minutes) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	@touch $@

.venv/.installed-dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv, with the tools for tests (one to three minutes) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ .venv/.installed

clean:  ## what commands made; .venv and released models stay
	rm -rf data/mtg data/franchises models/quickstart models/demo-* report.html report.json
