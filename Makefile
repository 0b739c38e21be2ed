# make repro   rebuild the study, JOBS runs at a time      make ui     browse the runs in MLflow, on this machine alone
# make test    lint, types and tests                      make bench  measure speed and memory on this machine
# make docs    the API reference, into docs/api           make audit  look for known vulnerabilities
# make clean   remove the environment
#
# Each sets up .venv from requirements.lock where that is missing or older. PYTHON names the interpreter, 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: repro test ui bench docs audit clean

repro: .venv/study
	python -m pipeline validate
	python -m pipeline run $(if $(JOBS),--jobs $(JOBS))

test: .venv/test
	ruff check
	ruff format --check
	mypy
	pytest -n auto

ui: .venv/study
	python -m pipeline track
	@echo 'Runs: http://127.0.0.1:5000/#/experiments?workflowType=machine_learning (Ctrl-C ends)'
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri sqlite:///mlflow.db --workers 1 --host 127.0.0.1 --port 5000

bench: .venv/study
	python -m benchmarks

docs: .venv/docs
	python -m docs.reference
	@echo 'API reference: docs/api/index.html'

# An environment of its own, since the tool is no part of the study. Strict, or what the service does not know would pass. One exception:
# DVC's diskcache unpickles the files that it keeps (CVE-2025-69872), and no release mends that. Nothing from outside gets there, but
# DVC keeps them where every user of a machine can put others (README.md says how to have them elsewhere).
audit: .venv/audit/bin/pip-audit
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --ignore-vuln CVE-2025-69872 --requirement requirements.lock

.venv/audit/bin/pip-audit:
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit

.venv/study: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[study]'
	touch $@

.venv/test: .venv/study
	python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[study,test]'
	touch $@

.venv/docs: .venv/study
	python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[study,docs]'
	touch $@

clean:
	rm -rf .venv
