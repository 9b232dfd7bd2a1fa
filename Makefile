# make demo      run the demo on the shipped images
# make test      run the tests
# make check     run the linters and the type checker
# make docs      build the documentation in site/
# make services  install the Debian packages that some tests need
# make image     build the container image
# make clean     delete everything that these commands created
#
# The first command creates .venv and installs the package and its dependencies there.
PYTHON ?= python3
BIN := .venv/bin
SERVICES := slurm-wlm munge dataset-fashion-mnist buildah debootstrap prometheus chromium
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

# Variables of `make image`, for instance: make image BASE=ubuntu:24.04 TAG=mine:1 IMAGE_FLAGS='--secret id=pip.conf,src=pip.conf'
# The first of BUILDERS that works on this machine builds the image.
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
	  { echo "$(PYTHON) is not Python 3.10 to 3.13. Set another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv || { echo "python3-venv is missing. Install it: apt-get install python3-venv"; exit 1; }
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
	test "$$builder" || { echo "docker (with a running daemon), podman or buildah is required, but none works here. Install one of them."; exit 1; }; \
	set -x; $$builder build $(if $(BASE),--build-arg BASE_IMAGE=$(BASE)) --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$(REVISION) --build-arg SOURCE=$(SOURCE) --tag $(TAG) $(IMAGE_FLAGS) .

clean:
	rm -rf .venv build dist site *.egg-info
