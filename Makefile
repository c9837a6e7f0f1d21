# make demo   trains a base, RLVR and SFT on the spot, compares them, says where the results lie
# make test   style, types, every op on every backend that runs here
# make bench  CPU benchmarks, as shares of ceilings measured in the same run
# make gpu    on a CUDA machine, in the Python that has torch: builds for its device, then tests, measures and writes
#             benchmarks/results/gpu-<device>.json, slice by slice; run again, it goes on. SLICE="a b": these
#             alone; AGAIN=1: what is done too; WITHIN=9: in so many minutes; RESULTS=dir: read and written there

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

.PHONY: demo test bench gpu clean

# PyTorch first and pinned, so that nothing later replaces the build that is installed.
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

TASKS := --tasks sort:3-5,reverse:3-5 --most 40

demo: $(VENV)/installed
	rm -rf demo-out
	$(BIN)/offprin train pretrain --out demo-out/base $(TASKS) --steps 160
	$(BIN)/offprin train rlvr --base demo-out/base/final --out demo-out/rlvr $(TASKS) --steps 30
	$(BIN)/offprin train sft --base demo-out/base/final --out demo-out/sft $(TASKS) --steps 60 --target 0.8
	$(BIN)/offprin analyze demo-out/base/final demo-out/rlvr/final demo-out/sft/final --names rlvr sft \
	    --out demo-out/analysis --save-masks --metrics spectrum,masks,energy --k 16

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops tests/gpu

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-disable-gc --benchmark-warmup=on

gpu: OPTIONS = $(if $(SLICE),--slice $(SLICE)) $(if $(AGAIN),--again) $(if $(WITHIN),--within $(WITHIN)) \
    $(if $(RESULTS),--results "$(RESULTS)")
gpu:
	OFFPRIN_CUDA=1 OFFPRIN_CUDA_ARCHS="$$($(PYTHON) -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")')" \
	    $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(PYTHON) -m benchmarks.gpu $(OPTIONS)

clean:
	rm -rf $(VENV) build demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find offprin_kernels -name '*.so' -delete
