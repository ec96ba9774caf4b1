# Every target makes what it needs: Python 3.10 or newer and make are enough to start.
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ARGS   ?=

# The notebooks run on this environment's own kernel, whatever kernels the user has registered elsewhere.
unexport JUPYTER_PATH
export JUPYTER_PREFER_ENV_PATH := 1

# Container images like to set this; every start of Python would then compile torch, diffusers and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

# The versions that are installed: with these the committed numbers were made. `make LOCK=` takes the newest ones that
# settings.ini allows, for instance from an index that has others.
LOCK ?= requirements.lock

# uv, the one on PATH or one fetched with pip. It does not read pip's configuration, so an index or a certificate set
# there is handed on.
define uv
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "ucdm needs Python 3.10 or newer as $(PYTHON); name another one: make PYTHON=python3.11 ..." >&2; exit 1; }; \
	set -e; uv=uv; \
	if ! uv --version >/dev/null 2>&1; then \
	  uv=$(VENV)-uv/bin/uv; \
	  [ -x $$uv ] || { $(PYTHON) -m venv $(VENV)-uv && $(VENV)-uv/bin/python -m pip install -q uv; } >/dev/null 2>&1 \
	  || { rm -rf $(VENV)-uv; $(PYTHON) -m pip install -q --target $(VENV)-uv uv >/dev/null 2>&1; } \
	  || { echo "$(PYTHON) could not fetch uv: it needs the network and either venv or pip (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }; \
	fi; \
	pipconf() { $(PYTHON) -m pip config list 2>/dev/null | sed -n "s/^global\.$$1='\(.*\)'$$/\1/p"; }; \
	if [ -z "$$UV_DEFAULT_INDEX$$UV_INDEX_URL$$UV_INDEX" ]; then \
	  index=$${PIP_INDEX_URL:-$$(pipconf index-url)}; [ -z "$$index" ] || export UV_DEFAULT_INDEX="$$index"; \
	fi; \
	cert=$${SSL_CERT_FILE:-$$(pipconf cert)}; [ -z "$$cert" ] || export SSL_CERT_FILE="$$cert"
endef

# The environment: uv makes .venv and installs what settings.ini asks for, in the versions of the lock. As constraints
# they fit any build of torch: an index of builds for CPU or another CUDA offers the same version, and needs less.
$(READY): settings.ini setup.py pyproject.toml $(LOCK)
	@$(uv); \
	[ -x $(BIN)/python ] || $$uv venv -q --python "$$(command -v $(PYTHON))" $(VENV); \
	echo "Installing ucdm and what it needs into $(VENV) ..."; \
	$$uv pip install -q --python $(BIN)/python $(LOCK:%=-c %) -e '.[dev]' || \
	  { echo "If the index lacks versions of $(LOCK): make LOCK= ... takes others; numbers may then differ." >&2; exit 1; }
	@touch $@

# notebooks at the same time
JOBS ?= 2

.PHONY: help reproduce test docs readme lab bench lock hooks clean distclean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

reproduce: $(READY) ## the main job: run every experiment (profile quick) into outputs/quick
	$(BIN)/ucdm-reproduce --profile quick --jobs $(JOBS) $(ARGS)

test: $(READY) ## everything that has to hold, stage by stage; the last line counts
	$(BIN)/python tests/run_all.py $(ARGS)

docs: $(READY) ## the documentation site, into _docs
	$(BIN)/ucdm-docs build $(ARGS)

readme: $(READY) ## README.md from nbs/index.ipynb
	$(BIN)/ucdm-docs readme

lab: $(READY) ## JupyterLab on the notebooks, saved clean
	cd nbs && $(CURDIR)/$(BIN)/jupyter lab --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter $(ARGS)

bench: $(READY) ## speeds on this machine
	$(BIN)/python -m ucdm.dev.bench $(ARGS)
	$(BIN)/python -m ucdm.dev.bench_store
	$(BIN)/python -m ucdm.dev.bench_reading
	$(BIN)/python -m ucdm.dev.cost_curves

lock: ## requirements.lock from settings.ini; ARGS=--upgrade takes the newest versions
	@$(uv); UV_CUSTOM_COMPILE_COMMAND="make lock" $$uv pip compile -q --universal --python-version 3.10 \
	  --extra dev --extra cluster --extra heic --extra export --no-emit-index-url --no-emit-find-links \
	  --annotation-style line -o requirements.lock setup.py $(ARGS)

hooks: $(READY) ## let git merge notebooks cell by cell (nbdev_merge) in this clone
	@set -e; attributes="$$(git rev-parse --git-path info/attributes)"; hook="$$(git rev-parse --git-path hooks/post-merge)"; \
	if [ "$$(git rev-parse --git-path hooks)" != "$$(git rev-parse --git-common-dir)/hooks" ]; then \
	  echo "git takes its hooks from $$(git rev-parse --git-path hooks) (core.hooksPath), which is not this clone's own folder; nothing was changed. Let core.hooksPath be unset here first." >&2; exit 1; \
	fi; \
	if [ -e "$$hook" ] && ! grep -q '/nbdev_trust" nbs$$' "$$hook"; then \
	  echo "there is another $$hook; nothing was changed. Move it away, or add to it: \"$(CURDIR)/$(BIN)/nbdev_trust\" nbs" >&2; exit 1; \
	fi; \
	git config --local merge.nbdev-merge.name "notebooks cell by cell"; \
	git config --local merge.nbdev-merge.driver "'$(CURDIR)/$(BIN)/nbdev_merge' %O %A %B %P"; \
	mkdir -p "$$(dirname "$$attributes")" "$$(dirname "$$hook")"; \
	grep -qxF '*.ipynb merge=nbdev-merge' "$$attributes" 2>/dev/null || printf '\n%s\n' '*.ipynb merge=nbdev-merge' >> "$$attributes"; \
	if [ ! -e "$$hook" ] || sed -n 2p "$$hook" | grep -q '^exec ".*/nbdev_trust" nbs$$'; then \
	  printf '#!/bin/sh\nexec "%s/nbdev_trust" nbs\n' '$(CURDIR)/$(BIN)' > "$$hook"; chmod +x "$$hook"; \
	fi

clean: ## remove docs, caches and smoke outputs (outputs/quick stays)
	rm -rf _docs _proc build dist .pytest_cache outputs/smoke nbs/nbdev.yml
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV) $(VENV)-uv *.egg-info
