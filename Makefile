# Two commands: `make demo` shows what it does, `make test` proves it. As root they also install what is missing
# (deploy/bootstrap); the Python environment is .venv. PYTHON chooses the interpreter, ARGS goes to pytest, bench or fuzz.

BIN := .venv/bin
ARGS ?=
export PYTHON

.PHONY: help demo test bench fuzz check deb venv clean

help:
	@echo 'make demo    downloads through 1, 10, 40 stripes, and by kcptun through 10 ports; the link limits each connection'
	@echo 'make test    every test; ARGS="-k name" for some'
	@echo 'make bench   speed, cost and round trip beside iperf3, haproxy, socat, UDP, in an hour; ARGS=--help for less'
	@echo 'make fuzz    the parsers under a fuzzer, a minute each; ARGS="--seconds 600 record" for one of them'
	@echo 'make check   lint, types, packaging, configuration files'
	@echo 'make deb     a package for Debian 12, in dist/'
	@echo 'make venv    only the Python environment, in .venv'
	@echo 'make clean   remove what was built'

demo:
	@deploy/bootstrap demo
	@deploy/venv
	@$(BIN)/python -m tests.demo

test:
	@deploy/bootstrap test
	@deploy/venv test
	$(BIN)/pytest -n 2 $(ARGS)

bench:
	@deploy/bootstrap bench
	@deploy/venv bench
	@$(BIN)/python -m tests.bench $(ARGS)

fuzz:
	@deploy/bootstrap check
	@deploy/venv fuzz
	@$(BIN)/python -m tests.fuzz $(ARGS)

check:
	@deploy/bootstrap check
	@deploy/venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	deploy/check-package
	deploy/wire-format --check

deb:
	@deploy/bootstrap deb
	@deploy/build-deb

venv:
	@deploy/bootstrap check
	@deploy/venv

clean:
	rm -rf .venv build dist findings *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
