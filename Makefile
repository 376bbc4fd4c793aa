# A fresh machine needs Python 3.10 or newer, a C++ compiler and the Python package index; nvcc and a GPU only add to it.
#
#   make demo    virtual environment, build, and the main job             (ARGS="--steps 100": see gradmill demo --help)
#   make test    every test                                               (ARGS="-k quant": pytest's arguments)
#   make wheel   builds dist/*.whl and proves it in an empty virtual environment, without and with triton
#   make bench   benchmarks against torch and installed peers, under 5 minutes   (ARGS: see bench/run.py)
#   make bench-peers    installs the peers in $(VENV)-peers, beside this torch; make bench then uses them
#   make instructions   instructions per element, registers, spills: compared with the committed table
#   make clean   removes what the above made
#
# PYTHON=python3.11 chooses the interpreter, VENV=folder the virtual environment. All paths are relative, so that the
# checkout's own path may contain spaces.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.10 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
BUILD_TOOLS := setuptools wheel pybind11 ninja
NATIVE := setup.py pyproject.toml $(shell find csrc -type f \( -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' \))

# Never with the checkout on sys.path: its kernels/ folder would hide the package of that name.
export PYTHONSAFEPATH := 1

.PHONY: demo test wheel bench bench-peers instructions clean install install-dev
.DELETE_ON_ERROR:

demo: install
	$(PY) -m gradmill demo $(ARGS)

test: install-dev
	$(PY) -m pytest --import-mode=importlib $(ARGS)

bench: install-dev
	"$$([ -x $(VENV)-peers/bin/python ] && echo $(VENV)-peers || echo $(VENV))/bin/python" bench/run.py $(ARGS)

instructions: install-dev
	$(PY) bench/instructions.py $(ARGS)

# Peers live in a virtual environment that sees the first one's packages behind its own; torch and numpy are held where they are.
bench-peers: install-dev
	@rm -rf $(VENV)-peers && "$(PY)" -m venv $(VENV)-peers
	@"$(PY)" -c 'import site, sys; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' > $(VENV)-peers/behind.line
	@mv $(VENV)-peers/behind.line "$$($(VENV)-peers/bin/python -c 'import site; print(site.getsitepackages()[0])')/behind.pth"
	@$(PY) -m pip list --format=freeze 2>/dev/null | grep -iE '^(torch|numpy|triton)==' > $(VENV)-peers/held.txt
	@failed=; grep -v '^#' bench/peers.txt | { while read -r peer; do \
		$(VENV)-peers/bin/python -m pip --disable-pip-version-check install -q -c $(VENV)-peers/held.txt "$$peer" >> $(VENV)-peers/log.txt 2>&1 || \
		$(VENV)-peers/bin/python -m pip --disable-pip-version-check install -q --no-deps "$$peer" >> $(VENV)-peers/log.txt 2>&1 || failed="$$failed $$peer"; done; \
		[ -z "$$failed" ] || echo "not installed (log: $(VENV)-peers/log.txt):$$failed"; }
	$(VENV)-peers/bin/python bench/peers.py

# --- installing: stamps in the virtual environment, so that nothing is done twice ---------------------------
install: $(VENV)/.installed

install-dev: $(VENV)/.installed $(VENV)/.installed-dev

$(PY):
	@if [ -z "$(PYTHON)" ]; then echo "gradmill needs Python 3.10 or newer, and none was found: install it, or name it with PYTHON=..." >&2; exit 1; fi
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "PYTHON=$(PYTHON): there is no such command" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"gradmill needs Python 3.10 or newer; $(PYTHON) is {v[0]}.{v[1]}. Name another with PYTHON=...")'
	@echo "making $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV) || { echo "python -m venv failed (on Debian and Ubuntu the package python3-venv has it)" >&2; rm -rf $(VENV); exit 1; }

# torch comes first and by itself: it is the large one, and what follows must not choose another.
$(VENV)/.torch: requirements-dev.txt | $(PY)
	$(PIP) install -q -c requirements-dev.txt $(BUILD_TOOLS)
	$(PIP) install -q -c requirements-dev.txt torch
	@touch $@

# An editable install: the package is this checkout. The build folder outlives it, so ninja recompiles only what changed.
$(VENV)/.installed: $(VENV)/.torch $(NATIVE)
	@for c in "$${GRADMILL_CXX:-$${CXX:-g++}}" c++; do command -v $${c%% *} >/dev/null 2>&1 && exit 0; done; \
		echo "gradmill needs a C++17 compiler, and neither $${GRADMILL_CXX:-$${CXX:-g++}} nor c++ was found: install g++ or clang, or set CXX" >&2; exit 1
	@echo "building gradmill (log: $(VENV)/build.log)"
	@$(PIP) install -v -c requirements-dev.txt --no-build-isolation -e . > $(VENV)/build.log 2>&1 || { tail -n 60 $(VENV)/build.log >&2; exit 1; }
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) install -q -r requirements-dev.txt
	@touch $@

# --- the wheel ----------------------------------------------------------------------------------------------
# The second environment is empty and the smoke test runs outside the checkout: nothing can come from here.
wheel: install
	rm -rf dist build/lib.* build/lib build/bdist.* build/wheel-venv build/wheel-smoke
	@mkdir -p build
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	"$(PY)" -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip --disable-pip-version-check install -q -c requirements-dev.txt dist/gradmill-*.whl
	@set -e; here="$$PWD"; away="$$(mktemp -d)"; trap 'rm -rf "$$away"' EXIT; cp tests/smoke.py "$$away/"; cd "$$away"; \
		echo "== without triton"; "$$here/build/wheel-venv/bin/python" smoke.py --without-triton; \
		cd "$$here"; build/wheel-venv/bin/python -m pip --disable-pip-version-check install -q -c requirements-dev.txt triton; cd "$$away"; \
		echo "== with triton"; "$$here/build/wheel-venv/bin/python" smoke.py
	@rm -rf build/wheel-venv
	@ls -l dist

clean:
	rm -rf .venv .venv-peers .venv-ci build dist demo_out *.egg-info .pytest_cache .hypothesis .benchmarks pyops/_C*.so pyops/_C*.tmp
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
