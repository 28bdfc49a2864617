PYTHON ?= python

.PHONY: style check test test-all bench gpu gpu-results demo-weights

# The installed package is tested, not the checkout, which `python -m` and `python -c` put first.
INSTALLED = $(PYTHON) -c "import runpy, sys; sys.path = [p for p in sys.path if p]; runpy.run_module(sys.argv.pop(1), run_name=\"__main__\")"
PYTEST = $(INSTALLED) pytest

style:  ## format the code and fix what can be fixed
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

check:  ## what CI demands of the code's style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

test:  ## the fast tests
	$(PYTEST)

test-all:  ## the slow ones too
	$(PYTEST) -m ""

bench:
	$(PYTEST) benchmarks/ --benchmark-only

# Uses no network: what `pip install ".[dev]"` brings must be installed. An editable install is replaced by a copy of the
# checkout as it is now; `pip install -e . --no-build-isolation --no-deps` brings it back. Meant to take ten minutes at
# most. All that it finds goes to benchmarks/results/<device>/.
gpu:  ## build with CUDA, then tests, compute-sanitizer and all benchmarks on this machine's NVIDIA GPU
	@nvidia-smi --list-gpus 2>/dev/null | grep -q . || { \
	  echo "make gpu needs an NVIDIA GPU, and nvidia-smi finds none here. Use 'make test bench' on a CPU." >&2; exit 1; }
	LESA_CUDA=1 $(PYTHON) -m pip install --no-index --no-build-isolation --no-deps --force-reinstall .
	$(MAKE) --no-print-directory gpu-results \
	  RESULTS="benchmarks/results/$$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--')"

gpu-results: export PYTEST_ADDOPTS = -m ""
gpu-results:
	@test -n "$(RESULTS)" || { echo "gpu-results is a part of 'make gpu'" >&2; exit 1; }
	mkdir -p "$(RESULTS)"
	{ $(INSTALLED) lesa_kernels.env_report; \
	  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv; \
	  git rev-parse HEAD 2>/dev/null || echo "no commit: this is not a git checkout"; } > "$(RESULTS)/machine.txt"
	@# Tests of kernels run on the GPU where there is one. Most of their time goes into compiling, so they share the cores.
	@# The last job is what else is marked as needing a GPU.
	@{ ls tests/test_gpu.py tests/lesa_kernels/test_*_kernels.py; echo tests; } | xargs -P 5 -I FILE sh -c \
	  'log="$(RESULTS)/$$(basename FILE .py).txt"; only=""; \
	   if [ FILE = tests ]; then only="-m gpu --ignore=tests/test_gpu.py"; fi; echo "pytest FILE $$only"; \
	   $(PYTEST) FILE $$only -v --no-header -p no:cacheprovider > "$$log" 2>&1 || { cat "$$log"; exit 255; }'
	$(PYTEST) benchmarks/ --benchmark-only --device cuda --benchmark-max-time 0.3 \
	  --benchmark-json "$(RESULTS)/benchmarks.json"
	$(PYTHON) benchmarks/roofline.py --out "$(RESULTS)/roofline.md"
	$(PYTHON) benchmarks/end_to_end.py --device cuda --out "$(RESULTS)/end_to_end.json"
	@# initcheck has to see the kernels of torch too, whose reports are not ours, so its log is judged. Memory that torch
	@# keeps for later would hide what goes beyond a tensor, and what nobody has written.
	@for tool in memcheck racecheck initcheck; do \
	  log="$(RESULTS)/$$tool.txt"; \
	  if ! command -v compute-sanitizer > /dev/null; then \
	    echo "skipped: compute-sanitizer is not on PATH, so $$tool did not run" | tee "$$log"; continue; \
	  fi; \
	  echo "compute-sanitizer --tool $$tool"; \
	  case $$tool in \
	    initcheck) options="--print-limit 0 --show-backtrace no"; judge="$(PYTHON) benchmarks/sanitize.py --judge";; \
	    *) options="--error-exitcode 1"; judge=:;; \
	  esac; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool $$options --log-file "$$log" \
	    $(PYTHON) benchmarks/sanitize.py && $$judge "$$log" || { tail -n 40 "$$log"; exit 1; }; \
	done

demo-weights:  ## make the bundled models and predictors again
	$(PYTHON) -m lesa.demo.make_weights
	$(PYTHON) -m lesa.demo.make_photos
