# Everything that development needs; the first target that runs makes the environment.

# glibc gives memory back to the kernel between two steps, and torch on CPU waits for it: 10 times slower without these.
export MALLOC_MMAP_THRESHOLD_ = 4000000000
export MALLOC_TRIM_THRESHOLD_ = 4000000000
export MALLOC_TOP_PAD_ = 500000000
export HF_HUB_OFFLINE = 1

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
READY = $(VENV)/.ready
OUT ?= out

.PHONY: demo test lint bench sheet train clean

demo: $(READY)
	@mkdir -p $(OUT)
	$(RUN) -m lib_demofusion "two purple striped discs on snow" --scale 4 --seed 1 --compare -o $(OUT)/demo.png
	@echo "result:     $(OUT)/demo.png"
	@echo "comparison: $(OUT)/demo-compare.png (left: the 1x base enlarged; right: DemoFusion)"

test: $(READY)
	$(RUN) -m pytest

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(READY)
	$(RUN) -m benchmarks.bench

sheet: $(READY)
	$(RUN) -m benchmarks.contact_sheet

train: $(READY)
	$(RUN) -m training.train

clean:
	rm -rf $(VENV) $(OUT) training/build build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@
