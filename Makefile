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

# An environment of the oldest versions, with Python 3.10, the WebUI's, where there is one (pyenv's included), else PYTHON.
PYTHON_OLDEST ?= $(or $(shell PYENV_VERSION=3.10 python3.10 -c "import sys; print(sys.executable)" 2>/dev/null),$(PYTHON))
VENV_OLDEST ?= .venv-oldest
RUN_OLDEST = $(VENV_OLDEST)/bin/python
READY_OLDEST = $(VENV_OLDEST)/.ready

.PHONY: demo test test-oldest lint bench bench-decode bench-memory bench-distributed performance sheet settings-sheet evaluate train clean webui test-webui bench-webui export-webui

demo: $(READY)
	@mkdir -p $(OUT)
	$(RUN) -m lib_demofusion "two purple striped discs on snow" --scale 4 --seed 1 --compare -o $(OUT)/demo.png
	@echo "result:     $(OUT)/demo.png"
	@echo "comparison: $(OUT)/demo-compare.png (left: the 1x base enlarged; right: DemoFusion)"

test: $(READY)
	$(RUN) -m pytest

# TESTS: pytest's arguments; all tests without
test-oldest: $(READY_OLDEST)
	$(RUN_OLDEST) -m pytest $(TESTS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(READY)
	$(RUN) -m benchmarks.bench

# docs/performance.md, on a GPU; PERFORMANCE=--small for a machine without one
performance: $(READY)
	$(RUN) -m benchmarks.performance $(PERFORMANCE)

bench-memory: $(READY)
	$(RUN) -m benchmarks.bench_memory

# Two ranks on two cores against one; BENCH=--foreseen writes the table of docs/distributed.md
bench-distributed: $(READY)
	$(RUN) -m benchmarks.bench_distributed $(BENCH)

# TILEVAE, the path of the Tiled VAE extension's scripts/tilevae.py, adds it to the table.
bench-decode: $(READY)
	$(RUN) -m benchmarks.bench_decode

sheet: $(READY)
	$(RUN) -m evaluation.contact_sheet

# EVALUATE=--quick for a first look; see python -m evaluation --help
evaluate: $(READY)
	$(RUN) -m evaluation $(EVALUATE)

settings-sheet: $(READY)
	$(RUN) -m evaluation.settings_sheet

# TRAIN="--recipe second" makes another checkpoint, to see whether what was found holds for it, by
# EVALUATE="--model training/build/second/second --layout row --tables Presets -o docs/evaluation-second.md"
# TRAIN="--recipe tile" makes the embedded checkpoint's ControlNet, TRAIN="--recipe lcm" its LCM-LoRA.
train: $(READY)
	$(RUN) -m training.train $(TRAIN)

# On a real host, AUTOMATIC1111's WebUI or one of Forge's kind: WEBUI_DIR is its folder, WEBUI_PYTHON its Python (with pytest,
# and playwright for the browser's test). OTHER_WEBUI_DIR and OTHER_WEBUI_PYTHON, another host's, add a comparison of both.
# SCREENSHOTS=folder keeps pictures of the form, as docs/webui has them; a font must have emoji in colour for that, such as
# the package fonts-noto-color-emoji.
# NEIGHBOURS_DIR, a folder with other extensions as they are cloned, adds the tests beside them, ControlNet's among them.
WEBUI_PYTHON ?= $(WEBUI_DIR)/venv/bin/python
export DEMOFUSION_PYTHON ?= $(abspath $(RUN))

webui:
	@test -n "$(WEBUI_DIR)" || { echo "set WEBUI_DIR to the folder of an installed WebUI"; exit 2; }

TEST_WEBUI = $(WEBUI_PYTHON) -m pytest --confcutdir=tests/webui -p no:cacheprovider
test-webui: webui $(READY)
	$(TEST_WEBUI) tests/webui --ignore tests/webui/control
	$(TEST_WEBUI) tests/webui/control  # in a host of its own, which has ControlNet

bench-webui: webui $(READY)
	$(WEBUI_PYTHON) -m benchmarks.bench_webui

# The embedded checkpoint as the WebUI reads one: make export-webui WEBUI_MODELS=.../models/Stable-diffusion
# Its LCM-LoRA goes to the folder Lora beside that.
export-webui: $(READY)
	$(RUN) -m training.export_webui $(or $(WEBUI_MODELS),$(error set WEBUI_MODELS to the folder to write to)) --lora $(WEBUI_MODELS)/../Lora

clean:
	rm -rf $(VENV) $(VENV_OLDEST) $(OUT) training/build build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(READY_OLDEST): pyproject.toml constraints-oldest.txt
	$(PYTHON_OLDEST) -m venv $(VENV_OLDEST)
	$(RUN_OLDEST) -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable ".[dev]"
	@touch $@
