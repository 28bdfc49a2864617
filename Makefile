PYTHON ?= python

.PHONY: style check test test-all bench gpu gpu-quick demo-weights

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

# Both need what `pip install ".[dev]"` brings, but no network and no installed package: they run a copy of the checkout
# in build/gpu-day. ARGS goes to benchmarks/gpu_day.py: names of parts, --out DIR, --budget SECONDS, or --help.
gpu-quick:  ## on this machine's NVIDIA GPU, what matters most, in four minutes; benchmarks/gpu-day.md says more
	$(PYTHON) benchmarks/gpu_day.py quick $(ARGS)

gpu:  ## on this machine's NVIDIA GPU, all benchmarks, all tests that need one, and compute-sanitizer
	$(PYTHON) benchmarks/gpu_day.py all $(ARGS)

demo-weights:  ## make the bundled models and predictors again
	$(PYTHON) -m lesa.demo.make_weights
	$(PYTHON) -m lesa.demo.make_photos
	$(PYTHON) -m lesa.demo.make_video
	$(PYTHON) -m lesa.demo.make_few_step
