# Two commands: `make reproduce` and `make test`. Each sets up .venv on its own, unless an environment that has all
# packages is active (venv or conda).
.ONESHELL:
.SHELLFLAGS := -eu -c
SHELL := /bin/sh
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
ACTIVE := $(shell [ -n "$${VIRTUAL_ENV:-}$${CONDA_PREFIX:-}" ] && python -m lib.pipeline.environment --check >/dev/null 2>&1 && echo yes)
ifeq ($(ACTIVE),yes)
  INSTALLED :=
else
  INSTALLED := .venv/complete
  export PATH := $(CURDIR)/.venv/bin:$(PATH)
  export VIRTUAL_ENV := $(CURDIR)/.venv
endif
PROFILE ?=

.PHONY: reproduce test lint check bench demo docs crosscheck lock install clean-notebooks
reproduce: install
	$(if $(PROFILE),python -m lib.profile $(PROFILE))
	dvc repro
	python -m lib.claims

test: install
	python -m pytest -q -n auto --maxprocesses 4 --dist worksteal --cov --cov-report=term --cov-fail-under=90

lint: install  ## style, types, layers
	ruff check .
	ruff format --check .
	nbstripout --verify --keep-id notebooks/*.ipynb
	pyright
	lint-imports

check: install  ## fails when a claim of the profile in params.yaml does not hold
	python -m lib.claims --check

bench: install  ## latencies, as ratios within one run; attacks: python -m tests.bench.bench_attacks
	python -m lib.pipeline.benchmark
	python -m lib.pipeline.gpu_benchmark

demo:  ## puts onnxruntime beside the page docs/demo; needs npm. Networks and data: python -m lib.commands.demo
	cd docs/demo
	npm ci
	npm run --silent build
	echo "complete; to open it: python3 -m http.server --bind 127.0.0.1 --directory docs/demo"

docs: install  ## HTML in docs/_build/html, without a network; with the demo if `make demo` was run
	python -m lib.pipeline.environment --docs
	python -m sphinx --quiet --fail-on-warning --keep-going --nitpicky --fresh-env -b html docs docs/_build/html
	echo "complete; to open it: docs/_build/html/index.html"

crosscheck: .venv-crosscheck/complete  ## our attacks against foolbox, adv-lib and ART, in an environment of its own
	.venv-crosscheck/bin/python -m tests.crosscheck.run --here

lock:  ## after a bound in pyproject.toml has changed; needs an environment to begin with
	python -m lib.pipeline.environment --list | xargs python -m pip install --quiet -e ".[docs]" uv
	python -m lib.pipeline.environment --lock

clean-notebooks: install
	nbstripout --keep-id --extra-keys "metadata.language_info" notebooks/*.ipynb
	ruff format notebooks
	ruff check notebooks

install: $(INSTALLED)

.venv/complete: requirements.txt requirements-torch.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install one, or name it with PYTHON=…"; exit 1; }
	unset VIRTUAL_ENV
	"$(PYTHON)" -m venv .venv
	.venv/bin/python -m lib.pipeline.environment --install
	touch $@

# the second step adds the CUDA packages that torch needs where its build is not for CPUs
.venv-crosscheck/complete: tests/crosscheck/requirements.txt requirements-torch.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install one, or name it with PYTHON=…"; exit 1; }
	unset VIRTUAL_ENV
	"$(PYTHON)" -m venv --clear .venv-crosscheck
	.venv-crosscheck/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $<
	.venv-crosscheck/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-torch.txt
	touch $@
