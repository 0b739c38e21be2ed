# make repro   run the study, JOBS runs at once           make ui     browse the runs in MLflow, on this machine only
# make test    lint, type check and tests                 make bench  measure speed and memory on this machine
# make docs    write the API reference to docs/api        make audit  check for known vulnerabilities
# make clean   remove the environment
#
# Each target creates .venv from requirements.lock if it is missing or older. PYTHON names the interpreter, 3.11 or newer.

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
	pytest -n auto --dist loadgroup

ui: .venv/study
	python -m pipeline track --address http://127.0.0.1:5000
	@echo 'Ctrl-C stops the server'
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri sqlite:///mlflow.db --workers 1 --host 127.0.0.1 --port 5000

bench: .venv/study
	python -m benchmarks

docs: .venv/docs
	python -m docs.reference
	@echo 'API reference: docs/api/index.html'

# pip-audit has its own environment, because the study does not need it. --strict makes the audit fail if the service does not
# answer. One exception: DVC's diskcache unpickles its cache files (CVE-2025-69872), and no release fixes that. The files do not come
# from outside, but DVC keeps them where other users of the machine can write (docs/guide.md says how to move them).
audit: .venv/audit/bin/pip-audit
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --ignore-vuln CVE-2025-69872 --requirement requirements.lock

.venv/audit/bin/pip-audit:
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit

.venv/study: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is required, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
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
