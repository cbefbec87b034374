# The two commands are `make demo` and `make test`; the first call of either sets everything up.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all faults lint bench derive-memory screenshots clean

demo: $(READY)
	$(BIN)/lorasmith demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope

# Every pair of base model and adapter, not a covering part of them.
test-all: $(READY)
	$(BIN)/python -m pytest --campaign --ignore tests/faults --numprocesses auto --maxprocesses 8 --dist loadscope --timeout 600

# Every fault of tests/faults injected, not a sample of them; prints what was survived.
faults: $(READY)
	@mkdir -p build
	$(BIN)/python -m pytest tests/faults --campaign --figures build/faults.json --numprocesses auto --maxprocesses 8 --timeout 1800

lint: $(READY) build/typing/lorasmith
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python benchmarks/run_all.py

# The [memory.*] tables of presets/*.toml, counted on the meta device; an hour or so. FAMILY="sdxl flux1" for some.
derive-memory: $(READY)
	$(BIN)/python -m lorasmith.engine.simulation.derive $(FAMILY)

screenshots: $(READY)
	$(BIN)/python screenshots/make.py

# torch first and at its pin: a range would take the newest build with every CUDA package.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorasmith needs Python 3.11 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	@echo "Installing PyTorch: the largest part, a download of up to some GB"
	@$(BIN)/python -m pip install --constraint constraints.txt torch
	@echo "Installing lorasmith and what it needs: a minute or two"
	@mkdir -p build
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" >build/setup.log 2>&1 || \
		{ cat build/setup.log; exit 1; }
	@touch $(READY)

# Type checkers cannot follow the import hook of an editable install: a tree of links shows them the package names.
build/typing/lorasmith:
	mkdir -p $@
	ln -sfn ../../../engine $@/engine
	ln -sfn ../../../tui $@/tui
	ln -sfn ../../../presets $@/presets

clean:
	rm -rf .venv build dist
