# Every target sets up what it needs. PYTHON is the interpreter, VENV the environment that is made with it.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
# Most tests compute on one thread.
IN_PARALLEL = -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test docs lint wheel test-wheel sanitize benchmark gpu clean

demo: $(VENV)/ready  ## the paper's Table 1, measured here in about a minute
	$(BIN)/python -m pytest --benchmark --quick -q -k table1

test: $(VENV)/ready  ## all tests, on every backend that can run here
	CONVNORM_REQUIRE_NATIVE=1 $(BIN)/python -m pytest $(IN_PARALLEL)

docs: $(VENV)/ready  ## the documentation, to build/docs, without a network; every link in it is checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

benchmark: $(VENV)/ready  ## against the bare read of the weights; results go to benchmarks/results
	$(BIN)/python -m pytest --benchmark

$(VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q setuptools wheel "$(TORCH)"
	$(BIN)/pip install -q --no-build-isolation -e ".[test,report,benchmark,train,ray,examples,docs,lint]"
	touch $@

lint: $(VENV)/ready  ## formatting and lint, with pinned tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	git ls-files 'csrc/*' 'tests/emulation/*' | xargs $(BIN)/clang-format --dry-run --Werror

wheel: $(VENV)/ready  ## dist/: one wheel with the extension, and one of pure Python
	rm -rf dist build/lib* build/bdist*
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	CONVNORM_NO_EXT=1 $(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .

test-wheel: wheel  ## both wheels pass the tests, installed in a clean environment away from the source
	away=$$(mktemp -d) && cp -r tests $$away && here=$$PWD && cd $$away && \
	$(PYTHON) -m venv clean && clean/bin/pip install -q "$(TORCH)" && \
	clean/bin/pip install -q "$$(ls $$here/dist/*-abi3-*.whl)[test]" && \
	CONVNORM_REQUIRE_NATIVE=1 clean/bin/python -m pytest -q $(IN_PARALLEL) tests --long 1000 --seed 1 && \
	clean/bin/pip install -q --force-reinstall --no-deps $$here/dist/*-none-any.whl && \
	clean/bin/python -m pytest -q $(IN_PARALLEL) tests --long 1000 --seed 1 && rm -rf $$away

SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g
sanitize: $(VENV)/ready  ## the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	CONVNORM_CUDA=0 CONVNORM_CXX_FLAGS="$(SANITIZERS)" $(BIN)/python setup.py -q build --build-lib build/sanitized \
	  --build-temp build/sanitized-objects
	away=$$(mktemp -d) && cp -r tests $$away && here=$$PWD && cd $$away && \
	PYTHONPATH=$$here/build/sanitized CONVNORM_REQUIRE_NATIVE=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	$$here/$(BIN)/python -m pytest -q -k "native or test_optim or gradient or state" --long 2000 --seed 1 \
	tests/test_values.py tests/test_sizes.py tests/test_momentum.py tests/test_optim.py && rm -rf $$away

gpu: $(VENV)/ready  ## with a GPU: all tests, the CUDA kernels under compute-sanitizer, the benchmarks, a training epoch
	CONVNORM_REQUIRE_NATIVE=1 $(BIN)/python -m pytest
	compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest -q tests/test_values.py tests/test_momentum.py \
	  -k "native-cuda" --long 200
	$(BIN)/python -m pytest --benchmark
	$(BIN)/python -m benchmarks.epoch

clean:
	rm -rf $(VENV) build dist *.egg-info convnorm/*.so
