# The parts of the gate by the names that people try first; `.ci/run` runs all of them in a fresh environment.
.PHONY: install format lint types test slow gate docs pythons

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

# The default tests on the other Pythons, each in an environment of its own; one that is absent is named.
pythons:
	@for version in 3.12 3.13; do \
	  if ! python$$version -c "" 2> /dev/null; then echo "python$$version: not here, not tested"; continue; fi; \
	  python$$version -m venv .venv-$$version && \
	  .venv-$$version/bin/pip install --quiet -e ".[test]" && \
	  .venv-$$version/bin/pytest -q || exit 1; \
	done

gate:
	.ci/run

docs:
	python docs/make_options.py > docs/options.md
