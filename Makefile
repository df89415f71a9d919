# `make demo` sets up and runs the main job; `make test` sets up and passes the tests; `make install` only sets up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := $(VENV)/.docs
DEMO := runs/shapes-demo

.PHONY: install demo test docs faults lint format lines clean
.DEFAULT_GOAL := demo

install: $(READY)

demo: $(READY)
	$(BIN)/sfd run recipes/shapes-demo.yaml --out $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest

# The documentation site, in build/site; warnings are errors.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# At most 15 minutes on two cores; rewrites the table in docs/reliability.md.
faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m faults --write

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Lines of Python against what each folder may have, and the files of more than 400 lines.
lines:
	@git ls-files '*.py' | xargs wc -l | awk ' \
		BEGIN { most["src"] = 11000; most["tests"] = 9000; most["benchmarks"] = 2000; most["faults"] = 900 } \
		$$2 == "total" { next } \
		{ split($$2, part, "/"); lines[part[1]] += $$1 } \
		$$1 > 400 { long = long sprintf("%-10s %6d lines\n", $$2, $$1) } \
		END { for (name in most) printf "%-10s %6d of at most %5d\n", name, lines[name], most[name]; printf "%s", long }'

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# requirements.txt pins every package; the project itself is installed in place, so that changes to it take effect.
# The optional extractor `inception` and the torchvision that it brings lie apart, where only its test looks: a torchvision
# that was built for another PyTorch breaks whatever finds it on the path.
$(READY): requirements.txt requirements-inception.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VENV)/inception --requirement requirements-inception.txt
	touch $@

$(DOCS): $(READY) requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV)
