# Two commands: `make demo` and `make test`. Both set up what they need; a second run with nothing changed sets up nothing.
#
#   TORCH_SOURCE   where pip finds the CPU build of torch, e.g. "--find-links DIR" or "--index-url URL" of PyTorch's
#                  CPU packages. Empty: pip's own configuration; if that is PyPI, `make test` needs it on x86 (see below).
#   NGC_PIP_FLAGS  further flags of `make setup-ngc`'s pip, e.g. --dry-run
#   PYTHON         the interpreter the environments are made with (>= 3.11)

PYTHON ?= python3
TORCH_SOURCE ?=
VENV := .venv
SGLANG := .venv-sglang
PY := $(VENV)/bin/python
PIP := -m pip install --quiet --disable-pip-version-check
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export GLOO_SOCKET_IFNAME ?= lo

.PHONY: setup setup-sglang setup-ngc demo experiment test test-slow test-kill test-report check bench bench-sync doctor clean

setup: $(VENV)/.ready
setup-sglang: $(SGLANG)/.ready

$(VENV)/.ready: setup.py constraints/cpu.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PY) $(PIP) "setuptools>=77" wheel
	$(PY) $(PIP) $(TORCH_SOURCE) -c constraints/cpu.txt torch
	$(PY) $(PIP) -c constraints/cpu.txt --no-build-isolation -e '.[dev,report]'
	touch $@

# SGLang for this project's tests on a machine without CUDA, not for users: it imports only with the stand-ins for its
# compiled kernels in tests/sglang_shims, and beside another torch than it asks for. Its pins differ from the trainer's, so
# it lives apart; its dependency list is complete, hence --no-deps. PyPI's torch for x86 is built for CUDA, whose libraries
# that list has not: there TORCH_SOURCE must name a CPU build.
$(SGLANG)/.ready: constraints/sglang-cpu.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python $(PIP) "setuptools>=77" wheel
	$(SGLANG)/bin/python $(PIP) $(TORCH_SOURCE) --no-deps "$$(grep '^torch==' constraints/sglang-cpu.txt)"
	$(SGLANG)/bin/python $(PIP) --no-deps -r constraints/sglang-cpu.txt
	$(SGLANG)/bin/python -W ignore -c 'import torch' \
	    || { echo "error: $(SGLANG)'s torch does not import; name PyTorch's CPU build by TORCH_SOURCE"; exit 1; }
	touch $@

# Inside an NGC PyTorch image: its own torch, transformer-engine and apex are used, and none is replaced. They are
# development builds from local files, which `pip freeze` gives no version of; the image's own constraint file would
# forbid the rest.
IMAGE_PINS ?= /tmp/image-pins.txt
setup-ngc:
	$(PYTHON) tools/image_pins.py > $(IMAGE_PINS)
	env -u PIP_CONSTRAINT $(PYTHON) $(PIP) $(NGC_PIP_FLAGS) -c constraints/ngc.txt -c $(IMAGE_PINS) --no-build-isolation -e '.[report]'

demo: setup
	$(PY) examples/tabletop/demo.py

experiment: setup
	$(PY) examples/tabletop/experiment.py

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: setup setup-sglang
	$(PY) -m pytest -m "not slow and not kill and not report"

test-slow: setup setup-sglang
	$(PY) -m pytest -m "slow"

test-kill: setup setup-sglang
	$(PY) -m pytest -m "kill"

test-report: setup
	$(PY) -m pytest -m "report"

bench: setup
	$(PY) tools/bench_head.py
	$(PY) tools/bench_policy_loss.py
	$(PY) tools/bench_advantages.py
	$(PY) tools/bench_shared_prompt.py
	$(PY) tools/bench_step.py
	$(PY) tools/bench_vs_trl.py
	$(PY) tools/bench_video.py
	$(PY) tools/bench_ledger.py

bench-sync: setup setup-sglang
	$(PY) tools/bench_sync.py

doctor: setup
	$(PY) -m dppo_mcore.doctor

clean:
	rm -rf $(VENV) $(SGLANG) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
