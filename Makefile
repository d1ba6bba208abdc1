# Needs make and Python 3.11 or newer; everything else is set up by the targets, in .venv.
#
#   make demo    start an embedded PostgreSQL and watch 10,000 executions flow
#   make test    the test suite: PostgreSQL 18, the part that meets the database again on 16 and 15, a part on the newest Python
#   make check   format, lint, types, import directions
#   make bench   the benchmarks, each with its settings; BENCH=name runs one, BENCH_ARGS='--json FILE --plot FOLDER' is passed on
#   make bench-peers   durable steps, drain and latency beside public packages, which it installs; BENCH=steps, drain or latency runs one
#   make clean   remove environments and caches
#
# PYTHON=python3.12 chooses the interpreter, WORKERS=2 the number of processes for tests (4), PYTEST_ARGS='-k claim' what pytest gets.

WORKERS ?= 4
PYTEST_ARGS ?=
PYTHON ?=
export PYTHON

VENV := .venv
PYTEST := python -m pytest -n $(WORKERS) --dist worksteal --durations=15 $(PYTEST_ARGS)
# With the oldest server meets what speaks to it in ways of its own: listening, transactions, cancelling, events.
OLDEST_TESTS := $(wildcard tests/sql $(addprefix tests/runtime/test_,channels.py control.py events.py listener.py \
	transactions.py worker.py))
SQL_TESTS := $(wildcard tests/sql)
PYTHON_TESTS := $(wildcard tests/unit tests/runtime)
DEBIAN_15 := /usr/lib/postgresql/15/bin
# What searches at random, or through all orders, does so once: the time of the whole run is bounded.
SEARCHES := --ignore=tests/sql/test_stateful.py --ignore=tests/sql/test_pairs.py --ignore=tests/runtime/test_wakeup_random.py

.PHONY: help demo test test-all test-16 test-15 test-newest-python check bench bench-peers clean

help:
	@sed -n 's/^#   //p' Makefile

demo:
	@sh .ci/setup $(VENV) embedded
	@$(VENV)/bin/pgconductor demo

# The whole suite comes last, so that its closing line is the last; a failure before it is remembered.
test:
	@sh .ci/setup $(VENV) dev
	@status=0; \
	for part in test-newest-python test-16 test-15 test-all; do \
		$(MAKE) --no-print-directory $$part || status=1; \
	done; \
	[ $$status = 0 ] || echo "make test: FAILED, see above"; \
	exit $$status

test-all:
	@sh .ci/setup $(VENV) dev
	@echo "== The whole suite, $$($(VENV)/bin/python --version), PostgreSQL as configured (default 18)"
	@$(VENV)/bin/$(PYTEST)

test-16:
	@sh .ci/setup $(VENV) dev
	@if [ -z "$(SQL_TESTS)" ]; then echo "== PostgreSQL 16: no tests"; \
	elif [ -n "$$PGCONDUCTOR_TEST_DSN" ]; then echo "== PostgreSQL 16: left out, PGCONDUCTOR_TEST_DSN names the server"; \
	else echo "== PostgreSQL 16"; PGCONDUCTOR_TEST_SERVER=16 $(VENV)/bin/$(PYTEST) $(SEARCHES) $(SQL_TESTS); fi

test-15:
	@sh .ci/setup $(VENV) dev
	@if [ -z "$(OLDEST_TESTS)" ]; then echo "== PostgreSQL 15: no tests"; \
	elif [ -n "$$PGCONDUCTOR_TEST_DSN" ]; then echo "== PostgreSQL 15: left out, PGCONDUCTOR_TEST_DSN names the server"; \
	elif [ ! -x $(DEBIAN_15)/initdb ]; then echo "== PostgreSQL 15: left out, not installed (Debian 12: apt-get install postgresql-15)"; \
	else echo "== PostgreSQL 15"; PGCONDUCTOR_TEST_SERVER=$(DEBIAN_15) $(VENV)/bin/$(PYTEST) $(SEARCHES) $(OLDEST_TESTS); fi

test-newest-python:
	@if [ -n "$(PYTHON)" ]; then echo "== Newest Python: left out, PYTHON names the interpreter"; \
	elif [ -z "$(PYTHON_TESTS)" ]; then echo "== Newest Python: no tests"; \
	else \
		answer=$$(sh .ci/setup --newest $(VENV)-newest test) || exit 1; \
		if [ "$$answer" = same ]; then echo "== Newest Python: left out, only one supported version is installed"; \
		else echo "== $$($(VENV)-newest/bin/python --version)"; $(VENV)-newest/bin/$(PYTEST) $(SEARCHES) $(PYTHON_TESTS); fi; \
	fi

# The two that read all types take as long as all else together: one of them beside the others.
check:
	@sh .ci/setup $(VENV) dev
	@log=$$(mktemp) || exit 1; trap 'rm -f "$$log"' EXIT; \
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python >"$$log" 2>&1 & pyright=$$!; \
	status=0; \
	for tool in "ruff format --check ." "ruff check ." lint-imports mypy; do \
		echo "== $$tool"; $(VENV)/bin/$$tool || status=1; \
	done; \
	wait $$pyright || status=1; \
	echo "== pyright"; cat "$$log"; echo; \
	exit $$status

bench:
	@sh .ci/setup $(VENV) dev
	@for name in $(or $(BENCH),$(filter-out harness plots,$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/[a-z]*.py)))); do \
		echo "== $$name"; $(VENV)/bin/python -m benchmarks.$$name $(BENCH_ARGS) || exit 1; \
	done

# What cannot be installed is left out of the comparison.
bench-peers:
	@sh .ci/setup $(VENV) dev
	@sh benchmarks/peers/install $(VENV)/bin/python
	@for name in $(or $(BENCH),steps drain latency); do \
		echo "== peers.$$name"; $(VENV)/bin/python -m benchmarks.peers.$$name $(BENCH_ARGS) || exit 1; \
	done

clean:
	rm -rf .venv .venv-newest .venv-peers .venv-peers-oban benchmarks/peers/node/node_modules .venv*-setup.log build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
