# Every target sets itself up; only Python (>= 3.10) and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(shell date +%Y-%m-%d_%H-%M-%S)
# One thread a process: two beside a busy neighbour were measured to be eight times slower.
export OMP_NUM_THREADS ?= 1

.PHONY: help quickstart test test-fast test-slow check docs bench stress cluster sites nvflare flower tensorboard clean

help:
	@echo "make quickstart   install, train a global model, personalise it, print the tables (2 minutes after installing)"
	@echo "make test         install with the development extras, run the fast tests, then the tables over all methods"
	@echo "make test-fast    the fast tests alone: about five minutes on two cores"
	@echo "make test-slow    the tests that take longer: clusters, killed workers, networks"
	@echo "make check        ruff, ruff format, mypy"
	@echo "make docs         build the documentation into build/site; needs no network once installed"
	@echo "make bench        measure speed beside a bare PyTorch loop"
	@echo "make stress       kill a run at random moments, resume it, compare the bits"
	@echo "make sites        start a server and three sites on this machine, train and personalise, compare with the simulation"
	@echo "make nvflare      the same through NVFlare, in an environment of its own: five methods beside their simulations"
	@echo "make flower       the same through Flower"
	@echo "make cluster      start a Ray cluster of two nodes on this machine and run the default job on it"
	@echo "make tensorboard  look at the runs in logs/"

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	@touch $@

quickstart: $(VENV)/installed
	$(BIN)/python train.py executor=processes hydra.run.dir=logs/quickstart/$(STAMP)/train
	$(BIN)/python personalize.py checkpoint=logs/quickstart/$(STAMP)/train curves.every=5 \
		hydra.run.dir=logs/quickstart/$(STAMP)/personalize
	@echo
	@echo "Look at the curves:  $(BIN)/tensorboard --logdir logs/quickstart"

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not every"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "every and not slow"

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not every"

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html"

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks

stress: $(VENV)/installed-dev
	$(BIN)/python -m tests.stress_kill --kills 30
	$(BIN)/python -m tests.sites.stress_kill --kills 30

sites: $(VENV)/installed
	$(BIN)/python -m studies.sites_demo

# One environment for each: what they require contradicts the other's and ours for development.
nvflare flower: %: $(VENV)-%/installed
	$(VENV)-$@/bin/python -m studies.hosts_demo $@

$(VENV)-%/installed: pyproject.toml
	test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-$*/bin/python -m pip install --quiet -e ".[$*]"
	@touch $@

cluster: $(VENV)/installed-dev
	$(BIN)/python -m studies.ray_demo hydra.run.dir=logs/cluster/$(STAMP)

tensorboard: $(VENV)/installed
	$(BIN)/tensorboard --logdir logs

clean:
	rm -rf $(VENV) $(VENV)-nvflare $(VENV)-flower build *.egg-info .mypy_cache .ruff_cache
