# What people and CI call; the logic lives in the tools.
BACKEND ?= nftables
KERNEL ?= 6.1
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup lab fmt lint type units-a units-b laws check test test-vm soak soak-all vm-shell demo golden manual man fuzz bench wheel clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: .cache/setup.stamp ## Make .venv, and install what Debian packages are missing

.cache/setup.stamp: pyproject.toml lab/host-packages.txt lab/setup.sh
	sh lab/setup.sh && touch $@

lab: setup ## Fetch the kernels and servers of the tests into .cache
	$(PY) -m lab.fetch all

fmt: setup ## Format the code
	.venv/bin/ruff check --fix --quiet . ; .venv/bin/ruff format .

lint: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

type: setup
	.venv/bin/mypy

check: setup ## Lint, types and pure tests, under a minute
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target units-a units-b laws type lint

# Fewer examples of each law, and nothing that takes long: make check.
QUICK := $(PY) -m pytest -q -p tests.quick -m "not kernel and not slow"

# In two halves, for two processors.
units-a: setup
	$(QUICK) tests/unit/test_[a-f]*.py tests/contract

units-b: setup
	$(QUICK) tests/unit/test_[!a-f]*.py

laws: setup
	$(QUICK) tests/property

test: lab ## Everything: pure tests, and the kernel tests on three kernels
	$(PY) -m lab.suite

test-vm: lab ## The kernel tests on one kernel: make test-vm KERNEL=6.12 ARGS="-k ftp"
	$(PY) -m lab.suite --kernel $(KERNEL) $(ARGS)

vm-shell: lab ## A shell in a virtual machine: make vm-shell KERNEL=6.12
	$(PY) -m lab.vm shell --kernel $(KERNEL)

demo: lab ## FTP through a stateful router, without and with a helper; BACKEND=nftables|iptables
	$(PY) -m lab.demo --backend $(BACKEND)

golden: setup ## Rewrite the expected texts of the tests; review the diff
	ORCH_UPDATE_GOLDEN=1 $(PY) -m pytest -q -m "not kernel" tests/unit

manual: setup ## Write docs/man and contrib/completion from the code
	$(PY) -m lab.manual

man: lab ## Build the pages for man(1) into dist/man
	$(PY) -m lab.inside -- $(PY) -m lab.manual --roff dist/man

soak: lab ## Applies, updates, deaths, drift and traffic at random, and what they leave: make soak SECONDS=600 SEED=1
	$(PY) -m lab.vm run --kernel $(KERNEL) --cpus 1 --timeout 7200 -- env ORCH_SOAK_S=$(or $(SECONDS),600) \
		ORCH_SOAK_SEED=$(or $(SEED),0) $(PY) -m pytest -q -m kernel tests/kernel/test_soak.py

soak-all: lab ## Kills, updates and faults under traffic, all of them: make soak-all KILLS=500 UPDATES=50
	$(PY) -m lab.vm run --kernel $(KERNEL) --cpus 1 --timeout 18000 -- env ORCH_KILLS=$(or $(KILLS),500) ORCH_FAULTS=all \
		ORCH_UPDATES=$(or $(UPDATES),50) $(PY) -m pytest -q -m kernel -k "killed or missed" \
		tests/kernel/test_supervision.py tests/kernel/test_zero_gap.py tests/kernel/test_faults.py

fuzz: setup ## Random input for every parser: make fuzz ARGS="--seconds 600"
	$(PY) -m tests.fuzz $(ARGS)

bench: lab ## Control path and data path against their peers, each in one virtual machine; a scrape, here
	$(PY) -m bench.control --kernel $(KERNEL)
	$(PY) -m bench.data --kernel $(KERNEL)
	$(PY) -m bench.exporter

wheel: setup ## Build the wheel into dist
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## Remove what was built and fetched
	rm -rf .cache .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
