# `make demo` and `make test` are all a newcomer needs; each installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
SERVICES := slurm-wlm munge dataset-fashion-mnist buildah debootstrap prometheus chromium
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

# make image BASE=ubuntu:24.04 TAG=mine:1 IMAGE_FLAGS='--secret id=pip.conf,src=pip.conf'; the first of BUILDERS that works builds
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' scale_mae/__init__.py)
REVISION := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
SOURCE := $(shell git remote get-url origin 2>/dev/null | sed -nE 's,^https://([^/@]*@)?,https://,p')
BUILDERS ?= docker podman buildah
BASE ?=
TAG ?= scale-mae:$(VERSION)
IMAGE_FLAGS ?=

.PHONY: setup demo test check docs services image clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.10 to 3.13 is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python -m scale_mae.demo runs/demo

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# The site goes to site/. Both steps work without a network and fail on a stale page, a broken link or a page outside the navigation.
docs: setup
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

services:
	$(SUDO) apt-get update --quiet=2
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends $(SERVICES)

image:
	@for builder in $(BUILDERS); do $$builder info >/dev/null 2>&1 && break; builder=; done; \
	test "$$builder" || { echo "make image needs docker with its daemon running, podman or buildah; none works here"; exit 1; }; \
	set -x; $$builder build $(if $(BASE),--build-arg BASE_IMAGE=$(BASE)) --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$(REVISION) --build-arg SOURCE=$(SOURCE) --tag $(TAG) $(IMAGE_FLAGS) .

clean:
	rm -rf .venv build dist site *.egg-info
