PYTHON ?= python

.PHONY: style check test bench gpu demo-weights

# -I: the installed package is tested, not the checkout, which `python -m` would put first.
PYTEST = $(PYTHON) -I -m pytest

style:  ## format the code and fix what can be fixed
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

check:  ## what CI demands of the code's style
	$(PYTHON) -m ruff check .

test:
	$(PYTEST)

bench:
	$(PYTEST) benchmarks/ --benchmark-only

# Uses no network: what `pip install ".[dev]"` brings must be installed. An editable install is replaced by a copy of the
# checkout as it is now; `pip install -e . --no-build-isolation --no-deps` brings it back. Results go to
# benchmarks/results/<device>/.
gpu:  ## build with CUDA, run the GPU tests and all benchmarks on this machine's NVIDIA GPU
	@nvidia-smi --list-gpus 2>/dev/null | grep -q . || { \
	  echo "make gpu needs an NVIDIA GPU, and nvidia-smi finds none here. Use 'make test bench' on a CPU." >&2; exit 1; }
	LESA_CUDA=1 $(PYTHON) -m pip install --no-index --no-build-isolation --no-deps --force-reinstall .
	$(PYTEST) -m gpu
	folder="benchmarks/results/$$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--')" \
	  && mkdir -p "$$folder" \
	  && $(PYTEST) benchmarks/ --benchmark-only --device cuda --benchmark-json "$$folder/benchmarks.json" \
	  && $(PYTHON) benchmarks/end_to_end.py --device cuda --out "$$folder/end_to_end.json"

demo-weights:  ## make the bundled model and predictors anew
	$(PYTHON) -m lesa.demo.make_weights
