# make demo    show the reaper at work on this machine's kernel
# make test    linters, type checker, all tests
# make bench   the figures, as a table and in build/bench.jsonl
#
# Each sets up what it needs by itself: Debian packages through apt (with sudo when not root) and a
# virtual environment in .venv.

PYTHON ?= python3
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

# pystemd is built from source (lupa, PyNaCl and msgspec come as wheels), tests and benchmarks run
# C programs, and lua-cjson shows that C modules load.
PACKAGES := python3 python3-venv python3-dev gcc libc6-dev pkg-config libsystemd-dev libpq5 lua-cjson \
    util-linux attr

.PHONY: demo test check bench clean packages
.DELETE_ON_ERROR:

demo: .venv/complete
	@$(SUDO) .venv/bin/python -m demo

test: check
	$(SUDO) env CI=$(CI) .venv/bin/python -m pytest

check: .venv/complete
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: .venv/complete
	@$(SUDO) .venv/bin/python -m bench

.venv/complete: pyproject.toml | packages
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

# Installs only what is missing, so that nothing is asked of root where nothing is needed.
packages:
	@missing=$$(for package in $(PACKAGES); do \
	    dpkg-query -W -f '$${db:Status-Status}\n' $$package 2>/dev/null | grep -qx installed \
	    || echo $$package; done); \
	if [ -n "$$missing" ]; then \
	    echo "installing" $$missing; \
	    $(SUDO) apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends \
	        $$missing >/dev/null; \
	fi

clean:
	rm -rf .venv build dist *.egg-info
