# make demo    show reaper and accessory at work on this machine's kernel
# make test    linters, type checker, all tests
# make test-long    those of the tests that can do more than in "make test": 200 kills, for example
# make test-system    those of the tests that need a whole machine: the Debian packages in Debian 13
# make bench   the figures, as a table and in build/bench.jsonl
# make deb     Debian packages in build/deb, built in a clean Debian 13
#
# Each sets up what it needs by itself: Debian packages through apt (with sudo when not root) and a
# virtual environment in .venv.

PYTHON ?= python3
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

# pystemd is built from source (the other Python packages come as wheels), tests and benchmarks run C
# programs and PostgreSQL servers of their own, lua-check reads scripts, and lua-cjson shows that C
# modules load.
PACKAGES := python3 python3-venv python3-dev gcc libc6-dev pkg-config libsystemd-dev libpq5 lua-check \
    lua-cjson postgresql iproute2 util-linux attr

# The machines: a root folder, a disk with it, an initrd, and what emulates the one with the controllers.
MACHINE_PACKAGES := mmdebstrap debian-archive-keyring e2fsprogs cpio xz-utils qemu-system-x86

PROGRAMS := build/libexec/cm4all-spawn-init build/libexec/cm4all-spawn-keeper

.PHONY: demo test test-long test-system check bench deb clean packages machine-packages
.DELETE_ON_ERROR:
.NOTPARALLEL:  # apt can be run once at a time

demo: .venv/complete $(PROGRAMS)
	@$(SUDO) .venv/bin/python -m demo

test: check $(PROGRAMS)
	$(SUDO) env CI=$(CI) .venv/bin/python -m pytest
	$(MAKE) test-system

test-long: .venv/complete $(PROGRAMS)
	$(SUDO) env CI=$(CI) LONG=1 .venv/bin/python -m pytest --verbose -m long

test-system: .venv/complete deb | machine-packages
	$(SUDO) .venv/bin/python -m pytest --verbose tests/system

check: .venv/complete
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: .venv/complete $(PROGRAMS)
	@$(SUDO) .venv/bin/python -m bench

deb:
	@$(SUDO) debian/make-deb

.venv/complete: pyproject.toml | packages
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

build/libexec/cm4all-spawn-%: spawn_accessory/programs/%.c | packages
	@mkdir -p $(@D)
	$(CC) -std=c17 -O2 -Wall -Wextra -Werror -static $(FREESTANDING) -o $@ $<

build/libexec/cm4all-spawn-init: FREESTANDING := -ffreestanding -nostdlib -fno-stack-protector

# Installs only what is missing, so that nothing is asked of root where nothing is needed. The package
# of PostgreSQL would make a server of its own and start it.
NO_SERVER := /etc/postgresql-common/createcluster.d/cm4all-spawn-test.conf
packages: WANTED = $(PACKAGES)
machine-packages: WANTED = $(MACHINE_PACKAGES)
machine-packages: | packages
packages machine-packages:
	@missing=$$(for package in $(WANTED); do \
	    dpkg-query -W -f '$${db:Status-Status}\n' $$package 2>/dev/null | grep -qx installed \
	    || echo $$package; done); \
	if [ -n "$$missing" ]; then \
	    echo "installing" $$missing; \
	    $(SUDO) mkdir -p $(dir $(NO_SERVER)) && \
	    echo 'create_main_cluster = false' | $(SUDO) tee $(NO_SERVER) >/dev/null && \
	    $(SUDO) apt-get update -qq && \
	    $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	        $$missing >/dev/null; \
	    status=$$?; $(SUDO) rm -f $(NO_SERVER); exit $$status; \
	fi

clean:
	$(SUDO) rm -rf .venv build dist *.egg-info
