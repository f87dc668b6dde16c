# Two commands for a newcomer: `make demo` and `make test`. Each does all of its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMPOSE := docker/compose.coordinator.yaml wardround/provision/templates/compose.yaml
PROFILES := --profile cpu --profile gpu --profile sqlite --profile postgresql
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' wardround/__init__.py)
ENGINE ?= $(notdir $(firstword $(shell command -v podman docker)))
# A thread a worker: two workers with two each spin while they wait for a core (benchmarks/LOG.md).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
ARCHIVE = wardround-site-$(VERSION).tar.gz

.PHONY: demo test test-fast lint docs matrix audit evidence images containers image-archive setup lock clean

demo: setup
	$(BIN)/wardround demo
	@echo '  first, in this shell: export PATH="$(CURDIR)/$(BIN):$$PATH"'

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec $(COMPOSE)
	for file in $(COMPOSE); do \
	  COORDINATOR=. $(BIN)/podman-compose --dry-run $(PROFILES) --file $$file config > /dev/null || exit; done

docs: setup
	$(BIN)/python docs/make_reference.py

# Every method on every family of backbones: more than half an hour on two cores.
matrix: setup
	$(BIN)/python benchmarks/matrix.py --whole --out benchmarks/results/$$(date +%F)-matrix.md

# What one private run gives away, beside what it claims; a minute. Nightly: the audits of every change are in tests/.
audit: setup
	$(BIN)/python benchmarks/audit.py --out benchmarks/results/$$(date +%F)-audit.json

# Federated beside central, local-only and random on real images: short with ARGS=--quick, else hours without a GPU.
# DATA is the folder that holds malaria_cells, cxr_pneumonia and bccd_cells: make evidence SUITE=malaria DATA=...
evidence: setup
	$(BIN)/python benchmarks/utility.py --suite $(SUITE) --data $(DATA) $(ARGS)

# Two images on one base, 7 GB together. BUILD takes what else the engine is told, such as --build-arg BASE_IMAGE=...
images:
	for target in site coordinator; do BUILDAH_FORMAT=docker $(ENGINE) build $(BUILD) --file docker/Dockerfile \
	  --target $$target --tag localhost/wardround-$$target:$(VERSION) . || exit; done

# Builds them and runs a federation of containers, looked at from inside; a quarter of an hour. No part of `make test`.
containers: setup
	WARDROUND_CONTAINERS=1 $(BIN)/python -m pytest -s tests/test_docker.py

# A site's image as one file for hospitals without a registry, its checksum, signed: make image-archive KITS=kits
image-archive:
	mkdir -p dist
	bash -o pipefail -c '$(ENGINE) save localhost/wardround-site:$(VERSION) | gzip -1 > dist/$(ARCHIVE)'
	cd dist && sha256sum $(ARCHIVE) > $(ARCHIVE).sha256
	openssl dgst -sha384 -sign $(KITS)/coordinator/signing.key -out dist/$(ARCHIVE).sha256.sig dist/$(ARCHIVE).sha256

setup: $(READY)

# Bytecode is compiled here, not at the first import, which would take a minute.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Wardround needs Python 3.11 to 3.13, found $$($(PYTHON) --version): call make with PYTHON=python3.12, say."; exit 2; }
	@echo "Setting up $(VENV): about 6.5 GB, a minute or more."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# The lock has hashes and no addresses, so that it serves behind any mirror.
lock:
	$(BIN)/uv pip compile --no-config --universal --generate-hashes --no-emit-index-url --no-emit-find-links \
	  --no-header --python-version 3.11 --all-extras --upgrade pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) runs
