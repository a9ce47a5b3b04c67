# The parts of the gate by the names that people try first; `.ci/run` runs all of them in a fresh environment.
.PHONY: install format lint types test slow gate docs

install:
	pip install -e ".[test]"

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

types:
	mypy

test:
	pytest

slow:
	pytest -m slow

gate:
	.ci/run

docs:
	python docs/make_options.py > docs/options.md
