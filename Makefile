PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
EVERYTHING := '.[train,test,lint,plot]'
# where no GPU is (NVIDIA's, AMD's, WSL's): else each process of DeepSpeed looks for one, and warns that there is none
ON_CPU := $(if $(wildcard /dev/nvidiactl /dev/kfd /dev/dxg),,DS_ACCELERATOR=cpu)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup train sanity check test kinds torture fuzz bench bench-gpu study docs lint format clean

help: ## Show these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18

setup: $(READY) ## Create .venv with everything, at the versions that were tested

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV), once, which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	@echo "1 of 2: torch, the largest download (some GB with CUDA)"
	$(call installed,torch setuptools)
	@echo "2 of 2: DeepSpeed, transformers, and what tests and checks need"
	$(call installed,--editable $(EVERYTHING))
	@touch $(READY)

# Every ten seconds the time since pip began, how much is installed, and what it does; what it said last, if it fails.
define installed
	@log=$(VENV)/pip.log; began=$$(date +%s); : > $$log; \
	(while sleep 10; do echo "  $$(($$(date +%s) - began)) s, $$(du -sh $(VENV) | cut -f 1): $$(tail -n 1 $$log | cut -c 1-90)"; \
	done) & watch=$$!; \
	pip install --progress-bar off --constraint constraints.txt $(1) > $$log 2>&1; code=$$?; \
	kill $$watch; [ $$code = 0 ] || tail -n 30 $$log; exit $$code
endef

train: setup ## Train the embedded default: a small Llama, a few minutes, no GPU needed (ARGS="--max_steps 50")
	$(ON_CPU) deepspeed --quiet launch/sft.py --smoothing 0.1 $(ARGS)

sanity: setup ## Check a run on one device before you start it (ARGS="--recipe recipes/...")
	python launch/sft.py --sanity $(ARGS)

check: setup ## Run the tests that start no run, under four minutes on two cores
	pytest -n 2 --no-loadscope-reorder --ignore tests/runs $(ARGS)

test: setup ## Run all tests, those of runs in one of two workers
	pytest -n 2 --no-loadscope-reorder $(ARGS)

kinds: setup ## Train every kind of model on two tensor-parallel ranks and on one process, and compare
	ALL_KINDS=1 pytest tests/runs/test_tensor_parallel.py $(ARGS)

torture: setup ## Kill runs fifty times at random moments and compare their weights (ARGS="--kills 50")
	python -m tests.runs.torture $(ARGS)

fuzz: setup ## Fuzz readers, recipes and the losses' arguments (hypothesis), and parsers of bytes (atheris)
	pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	FUZZ=30 pytest -s tests/launch/test_fuzz.py
	python -m tests.launch.fuzz_bytes $(ARGS)

bench: setup ## Time head and loss against the others on two CPU ranks; writes benchmarks/results/
	pip install --quiet --constraint constraints.txt --editable '.[bench]'
	python benchmarks/heads.py --rounds 7 --name bar $(ARGS)

bench-gpu: setup ## The same on one GPU (ARGS), then training runs (TRAIN_ARGS), against whatever can be installed
	-for peer in liger-kernel cut-cross-entropy quack-kernels; do pip install --quiet --constraint constraints.txt $$peer; done
	python benchmarks/gpu.py $(ARGS)
	python benchmarks/gpu_training.py $(TRAIN_ARGS)

study: setup ## Does smoothing help? Fine-tune SmolLM2-135M with and without it, for hours on a CPU (ARGS="--smoke")
	pip install --quiet --constraint constraints.txt --editable '.[study]'
	python -m benchmarks.study $(ARGS)

docs: setup ## Write docs/api.md from the docstrings, and docs/tensor-parallelism.md from the splits
	python -m docs.generate_api
	python -m docs.generate_tensor_parallelism

lint: setup ## Check style and types
	ruff check
	ruff format --check
	mypy

format: setup ## Apply style
	ruff check --fix
	ruff format

clean: ## Remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
