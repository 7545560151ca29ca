# `make demo`, `make test`, `make lab`, `make page` and `make book` each work on a bare clone: they build their environment,
# install, and run.
PYTHON ?= python3
BIN := .venv/bin
# Idle OpenMP threads sleep instead of spinning: on few cores spinning slows every other process down.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all lab student workbench page book bench export readme map clean

demo: .venv/installed
	$(BIN)/dpt_demo --out runs/demo --replace

# One thread each while two notebooks, then two test files, run side by side. The stories are for test-all.
test: .venv/installed
	$(BIN)/ruff check --quiet nbs tests benchmarks setup.py
	$(BIN)/ruff format --check --quiet nbs tests benchmarks setup.py
	$(BIN)/python -m pytest -q tests/test_repository.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/run_notebooks.py --workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests --ignore tests/test_repository.py -n 2 --dist loadfile --no-loadscope-reorder

# The stories and the cells and tests flagged slow, which train or export for minutes, or build the book and open it.
test-all: test .venv-book/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/run_notebooks.py --slow --workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests --slow -m slow -n 2 --dist load

# make lab at=workbench/workbench opens there instead; make workbench is short for that.
at ?= index
lab: .venv/installed
	$(BIN)/python -m dpt_nb.workbench.lab nbs/$(at).ipynb

# A copy to work in; what was worked on in it stays as it is.
student: .venv/installed
	$(BIN)/python -m dpt_nb.workbench.student student

workbench: .venv/installed
	$(BIN)/python -m dpt_nb.workbench.lab nbs/workbench/workbench.ipynb

# The workbench without JupyterLab around it, as a page for the browser: on this machine only, at the address with the token that it prints.
page: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[page]'
	$(BIN)/python -m dpt_nb.workbench.serve nbs/workbench/workbench.ipynb

# The course as a site in _docs/, from the outputs that are stored. Its own environment: it needs neither torch nor a kernel.
book: .venv-book/installed
	.venv-book/bin/python nbs/book/build.py

# What needs a GPU is left out: python benchmarks/gpu.py.
bench: .venv/installed
	for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

# After editing a notebook: the library from the notebooks, README from the front door.
export: .venv/installed
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/static_outputs.py
	$(BIN)/python tests/in_the_browser.py
	$(BIN)/python tests/chapter_times.py
	$(BIN)/python tests/render_readme.py

readme: .venv/installed
	$(BIN)/python tests/chapter_times.py
	$(BIN)/python tests/render_readme.py

# The front door's picture, from the outputs stored in the chapters.
map: .venv/installed
	$(BIN)/python tests/draw_map.py

# What was built. Runs and data stay: they may have taken days.
clean:
	rm -rf .venv .venv-book _docs _proc *.egg-info build dist

.venv/installed: settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv-book/installed: settings.ini
	test -x .venv-book/bin/python || $(PYTHON) -m venv .venv-book
	.venv-book/bin/python nbs/book/build.py --requirements > .venv-book/requirements.txt
	.venv-book/bin/python -m pip install --quiet --requirement .venv-book/requirements.txt
	touch $@
