# `make help` lists the targets. Each sets up what it needs by itself: a .venv with the tested versions
# (constraints.txt), or, with PYTHON=python3, the active environment, where only what is missing is
# installed and nothing, PyTorch least of all, is replaced.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test cpu sanitize emulator native gates wheel gpu gpu-tune lint clean active

# The interpreter that .venv is made from.
BASE_PYTHON ?= python3
# Where `make gpu` and `make gpu-tune` write their results.
RESULTS ?= benchmarks/results
# Versions of Triton that `make gates` checks besides the installed one; kept under build/.
TRITON_ASIDE ?= 3.6.0 3.9.0
# Where pip's messages go.
LOG := build/install.log
# Workers of the test suite.
JOBS ?= 2
# Compiled objects, which installs, gates and tests share: none compiles what another has compiled.
export GPTKERNELS_OBJECT_CACHE ?= $(CURDIR)/build/objects
# Else each of the tests' processes would compile all modules that it imports anew.
unexport PYTHONDONTWRITEBYTECODE
# More arguments for the command behind a target, such as ARGS="--text book.txt".
ARGS ?=

ifdef PYTHON
PY := $(PYTHON)
READY := active
else
PY := .venv/bin/python
READY := .venv/.ready
endif

define check_version
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo 'gptkernels needs Python 3.11 or newer, $(1) is not; name another with BASE_PYTHON or PYTHON' >&2; exit 2; }
endef

help: ##        | list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | \
		awk -F ':.*## | *[|] ' '{printf "  make %-8s %-6s  %s\n", $$1, $$2, $$3}'
	@echo
	@echo '  On two cores, the first time: what is compiled is kept. The first of them'
	@echo '  also sets up .venv: 3 minutes, and downloads of 0.7 GB, or 3 GB where'
	@echo '  PyTorch comes with CUDA.'
	@echo
	@echo '  PYTHON=python3      the active environment, not .venv; replaces no package'
	@echo '  BASE_PYTHON=python3 the Python that .venv is made from'
	@echo '  ARGS="..."          more arguments for demo, test, gates, gpu-tune'
	@echo '  RESULTS=folder      where make gpu and make gpu-tune write their results'

demo: $(READY) ## 5 min  | train a small GPT, check it, write a report
	$(PY) -m gptkernels demo $(ARGS)

test: $(READY) cpu emulator native ## 12 min | run the whole test suite
	$(PY) -m pytest -n $(JOBS) $(ARGS)

cpu: $(READY) ## 1 min  | bring the CPU kernels of this checkout up to date
	@if $(PY) scripts/cpu_extension.py --check >/dev/null; then $(PY) scripts/cpu_extension.py --inplace; fi

sanitize: $(READY) ## 6 min  | run the CPU kernels under ASan, UBSan and TSan
	$(PY) scripts/cpu_extension.py --sanitize

emulator: $(READY) ## 2 min  | build the CUDA kernels for this CPU, for the tests
	$(PY) scripts/extension.py emulator

native: $(READY) ## 6 min  | bring the CUDA kernels up to date, given GPU and nvcc
	@if $(PY) scripts/gpus.py && $(PY) scripts/extension.py native --check; then \
		$(PY) setup.py --quiet build_ext --inplace; fi

lint: $(READY) ## 1 min  | ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

gates: $(READY) ## 20 min | compile every kernel, hold it to the committed tables
	@status=0; \
	$(PY) -m gates $(ARGS) || status=1; \
	$(if $(filter nvcc builds,$(subst =, ,$(ARGS))),,$(if $(TRITON_ASIDE),$(PY) -m gates --triton $(TRITON_ASIDE) $(ARGS) || status=1;)) \
	exit $$status

# For machines like this one, so without the CUDA kernels unless they are asked for.
wheel: $(READY) ## 3 min  | build the sdist and a wheel for this machine in dist/
	@echo "Building the sdist and a wheel of it; what the build prints is in build/wheel.log"
	@env GPTKERNELS_BUILD_CUDA="$${GPTKERNELS_BUILD_CUDA:-0}" \
		$(PY) scripts/quietly.py build/wheel.log $(PY) -m build --outdir dist
	@ls dist

# Nothing is installed or downloaded: the active Python runs the checkout. The kernels are compiled for
# this GPU alone, by as many compilers as there are CPUs; -lineinfo names source lines to
# compute-sanitizer and profilers.
capability = import sys, torch; \
	torch.cuda.is_available() or sys.exit("make $@ needs an NVIDIA GPU that PyTorch can use, and finds none"); \
	print("%d%d" % torch.cuda.get_device_capability())
native_here = GPTKERNELS_CUDA_ARCHS=$$($(PYTHON) -c '$(capability)') NVCC_APPEND_FLAGS=-lineinfo \
	$(PYTHON) scripts/extension.py native && cp build/native/_cuda* gptkernels/
in_place = env -u TRITON_INTERPRET -u GPTKERNELS_EMULATE -u GPTKERNELS_EMULATE_ARCH \
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -P

gpu: PYTHON ?= python3
gpu: ## 8 min  | on a machine with a GPU: test and time the kernels
	@$(PYTHON) -c '$(capability)' >/dev/null
	@if $(PYTHON) scripts/extension.py native --check; then \
		$(PYTHON) scripts/extension.py emulator & \
		$(native_here) && wait $$!; \
	else rm -f gptkernels/_cuda*; echo 'going on without the CUDA C++ kernels'; fi
	$(in_place) -m benchmarks.gpu --results "$(RESULTS)"

gpu-tune: PYTHON ?= python3
gpu-tune: ## 8 min  | likewise: all builds and tiles, beside the best others
	@$(PYTHON) -c '$(capability)' >/dev/null
	@since=$$(date +%s); status=0; \
	if ! $(PYTHON) scripts/extension.py native --check; then \
		rm -f gptkernels/_cuda*; echo 'going on without the CUDA C++ kernels'; \
	elif ! { $(native_here); }; then \
		rm -f gptkernels/_cuda*; echo 'going on without the CUDA C++ kernels: the build failed'; status=1; \
	fi; \
	$(in_place) -m benchmarks.tune --results "$(RESULTS)" --since $$since $(ARGS) || status=$$?; \
	exit $$status

clean: ##        | remove what the targets made
	rm -f gptkernels/_cpu* gptkernels/_cuda*
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

active:
	$(call check_version,$(PY))
	@$(PY) scripts/install_missing.py

# --no-compile: Python compiles the modules that are imported. pip would compile all 12,000, for 40 s.
.venv/.ready: pyproject.toml constraints.txt setup.py
	$(call check_version,$(BASE_PYTHON))
	@echo 'Setting up .venv with the tested versions: once, 3 minutes on two cores, and downloads of 0.7 GB,'
	@echo 'or 3 GB where PyTorch comes with CUDA (README.md has the other one). Log: $(LOG)'
	@$(BASE_PYTHON) -m venv .venv
	@.venv/bin/python scripts/quietly.py $(LOG) .venv/bin/python -m pip install --verbose --progress-bar=off \
		--disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[all]'
	@touch $@
