# `make help` lists the targets. Each sets up what it needs by itself: a .venv with the tested versions
# (constraints.txt), or, with PYTHON=python3, the active environment, where only what is missing is
# installed and nothing, PyTorch least of all, is replaced.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test cpu sanitize emulator native gates gpu gpu-tune lint clean active

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

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo
	@echo '  PYTHON=python3      use the active environment instead of .venv; PyTorch stays as it is'
	@echo '  BASE_PYTHON=python3 the Python that .venv is made from'
	@echo '  ARGS="..."          more arguments for demo, test, gates, gpu-tune'
	@echo '  RESULTS=folder      where make gpu and make gpu-tune write their results'

demo: $(READY) ## train a small GPT on real text, check it against plain PyTorch, write a report
	$(PY) -m gptkernels demo $(ARGS)

test: $(READY) cpu emulator native ## run the whole test suite
	$(PY) -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

cpu: $(READY) ## bring the CPU kernels in this checkout up to date, where a C++ compiler is
	@if $(PY) scripts/cpu_extension.py --check >/dev/null; then $(PY) scripts/cpu_extension.py --inplace; fi

sanitize: $(READY) ## run every CPU kernel on several threads under ASan, UBSan and TSan
	$(PY) scripts/cpu_extension.py --sanitize

emulator: $(READY) ## build the CUDA kernels for this CPU, as the tests run them where no GPU is
	$(PY) scripts/extension.py emulator

native: $(READY) ## bring the CUDA kernels in this checkout up to date, where an NVIDIA GPU and nvcc are
	@if $(PY) scripts/gpus.py && $(PY) scripts/extension.py native --check; then \
		$(PY) setup.py --quiet build_ext --inplace; fi

lint: $(READY) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

gates: $(READY) ## compile every kernel ahead of time, Triton's and nvcc's, and hold it to the committed tables
	@status=0; \
	$(PY) -m gates $(ARGS) || status=1; \
	$(if $(filter nvcc builds,$(subst =, ,$(ARGS))),,$(if $(TRITON_ASIDE),$(PY) -m gates --triton $(TRITON_ASIDE) $(ARGS) || status=1;)) \
	exit $$status

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
gpu: ## on a machine with an NVIDIA GPU: test, verify and time the kernels; results as JSON in RESULTS
	@$(PYTHON) -c '$(capability)' >/dev/null
	@if $(PYTHON) scripts/extension.py native --check; then \
		$(PYTHON) scripts/extension.py emulator & \
		$(native_here) && wait $$!; \
	else rm -f gptkernels/_cuda*; echo 'going on without the CUDA C++ kernels'; fi
	$(in_place) -m benchmarks.gpu --results "$(RESULTS)"

gpu-tune: PYTHON ?= python3
gpu-tune: ## likewise: every build of the CUDA C++ kernels and every tile of Triton's, beside the best of others
	@$(PYTHON) -c '$(capability)' >/dev/null
	@since=$$(date +%s); status=0; \
	if ! $(PYTHON) scripts/extension.py native --check; then \
		rm -f gptkernels/_cuda*; echo 'going on without the CUDA C++ kernels'; \
	elif ! { $(native_here); }; then \
		rm -f gptkernels/_cuda*; echo 'going on without the CUDA C++ kernels: the build failed'; status=1; \
	fi; \
	$(in_place) -m benchmarks.tune --results "$(RESULTS)" --since $$since $(ARGS) || status=$$?; \
	exit $$status

clean: ## remove what the targets made
	rm -f gptkernels/_cpu* gptkernels/_cuda*
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

active:
	$(call check_version,$(PY))
	@$(PY) scripts/install_missing.py

# --no-compile: Python compiles the modules that are imported. pip would compile all 12,000, for 40 s.
.venv/.ready: pyproject.toml constraints.txt setup.py
	$(call check_version,$(BASE_PYTHON))
	@echo 'Setting up .venv with the tested versions, once: about 4 minutes on two cores and 0.6 GB to download,'
	@echo 'or 3 GB where pip takes the PyTorch that is made for CUDA (README.md says how to get the other one).'
	@echo 'What pip prints is in $(LOG).'
	@$(BASE_PYTHON) -m venv .venv
	@.venv/bin/python scripts/quietly.py $(LOG) .venv/bin/python -m pip install --verbose --progress-bar=off \
		--disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[all]'
	@touch $@
