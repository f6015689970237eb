# make demo | test | setup | lint | wheel | lock | clean; PYTHON=… chooses the interpreter.
.DEFAULT_GOAL := help
SHELL := /bin/sh
VENV := .venv
MODEL ?=
IMAGES ?=
# A file's tests share what they built, so a file stays with one worker.
PYTEST := $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: help setup demo test test-fast lint wheel lock clean

help:
	@echo "make setup       the environment, into $(VENV), from requirements.lock"
	@echo "make demo        build for this machine, run photographs, compare with ONNX Runtime"
	@echo "                 MODEL=model.onnx IMAGES=photos/ takes yours"
	@echo "make test        every check; make test-fast leaves the slow ones out"
	@echo "make lint        formatter, linter and type checker"
	@echo "make wheel       dist/netship-*.whl, for pipx or pip"
	@echo "make clean       remove $(VENV), out and dist"

setup:
	@./setup.sh "$(VENV)" "$(PYTHON)"

demo: setup
	@$(VENV)/bin/python -m runtime_demo.demo $(if $(MODEL),--model "$(MODEL)") $(if $(IMAGES),--images "$(IMAGES)")

test: setup
	@$(PYTEST)

test-fast: setup
	@$(PYTEST) -m "not slow"

lint: setup
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy

wheel: setup
	@rm -rf build && $(VENV)/bin/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist . && ls dist/netship-*.whl

# Needs uv; the lock carries hashes for every platform and no addresses.
lock:
	uv pip compile --universal --generate-hashes --python-version 3.11 --group demo --group dev \
	  --no-header --no-annotate --quiet --output-file requirements.lock pyproject.toml

clean:
	rm -rf "$(VENV)" out dist build netship.egg-info
