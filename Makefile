# Two commands: `make pretrain` trains a model on two processes, `make test` proves that the split changes nothing.
PYTHON ?= python3
NPROC ?= 2
# CPU threads of each process: torchrun's own default, without its warning
THREADS ?= 1
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

.PHONY: help pretrain test lint types check benchmark scaling peers gpu tune wheel clean

help:
	@echo "make pretrain    train a small byte-level model on Python's own library source, on $(NPROC) processes"
	@echo "                 (ARGS='--resume' goes on; ARGS='--help' lists every option)"
	@echo "make test        the whole test suite"
	@echo "make check       tests, lint and types: what to run before a change is sent"
	@echo "make benchmark   time a training step beside other tensor-parallel frameworks"
	@echo "make scaling     how well it scales over tp, pp and dp: tables and plots (3 minutes on 2 cores)"
	@echo "make peers       install what benchmarks.scaling --preset peers measures tpformer beside"
	@echo "make gpu         on a CUDA device, with the $(PYTHON) at hand: the kernels' tests and, if green, their speed"
	@echo "                 and the share of each kind of kernel in a training step"
	@echo "make tune        on a CUDA device: find the kernels' launch options (ARGS=--write keeps them)"
	@echo "make wheel       build the wheel into dist/"

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tpformer needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

pretrain: $(VENV)/installed
	OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --nproc-per-node $(NPROC) examples/pretrain.py --tp $(NPROC) $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

check: test lint types

benchmark: $(VENV)/installed
	OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --nproc-per-node 2 -m benchmarks.training $(ARGS)

scaling: $(VENV)/installed
	$(BIN)/python -m benchmarks.scaling $(ARGS)

# without what they depend on, which torch's own builds and the tests have in other versions
PEERS = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["peers"])
peers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$($(BIN)/python -c '$(PEERS)')

# A machine with a GPU has its own build of torch, and maybe no network to make .venv from
CUDA_PYTHON := env -u TRITON_INTERPRET PYTHONPATH=.:kernels $(PYTHON)

# other versions of torch and Triton have warnings of their own, which are no errors there
gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make gpu: torch sees no CUDA device here")'
	$(CUDA_PYTHON) -m pytest tests/kernels tests/proofs/test_on_device.py tests/test_overlap_on_device.py \
		tests/parallel/test_offload.py tests/train/test_optimizer_offload.py tests/train/test_memory.py -p no:cacheprovider -W default
	$(CUDA_PYTHON) -m benchmarks.kernels $(ARGS)
	$(CUDA_PYTHON) -m benchmarks.matmul $(filter --quick,$(ARGS))
	$(CUDA_PYTHON) -m benchmarks.step_profile --device cuda --preset 1b

tune:
	$(CUDA_PYTHON) -m benchmarks.tune $(ARGS)
	$(CUDA_PYTHON) -m benchmarks.tune_attention $(filter --write,$(ARGS))
	$(CUDA_PYTHON) -m benchmarks.tune_matmul $(filter --write,$(ARGS))

wheel: $(VENV)/installed
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .mypy_cache
