PYTHON ?= python

.PHONY: style check test bench gpu demo-weights

style:  ## format the code and fix what can be fixed
	ruff format .
	ruff check --fix .

check:  ## what CI demands of the code's style
	ruff check .

test:
	pytest

bench:
	pytest benchmarks/ --benchmark-only

# Uses no network: what `pip install ".[dev]"` brings must be installed. Results go to benchmarks/results/<device>/.
gpu:  ## build with CUDA, run the GPU tests and all benchmarks on this machine's NVIDIA GPU
	@nvidia-smi --list-gpus 2>/dev/null | grep -q . || { \
	  echo "make gpu needs an NVIDIA GPU, and nvidia-smi finds none here. Use 'make test bench' on a CPU." >&2; exit 1; }
	LESA_CUDA=1 $(PYTHON) -m pip install --no-index --no-build-isolation --no-deps --force-reinstall .
	pytest -m gpu
	folder="benchmarks/results/$$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--')" \
	  && mkdir -p "$$folder" \
	  && pytest benchmarks/ --benchmark-only --device cuda --benchmark-json "$$folder/benchmarks.json" \
	  && $(PYTHON) benchmarks/end_to_end.py --device cuda --out "$$folder/end_to_end.json"

demo-weights:  ## make the bundled model and predictors anew
	$(PYTHON) -m lesa.demo.make_weights
