"""The metrics of an exported configuration as model hubs show them beside a model: `.eval_results/*.yaml`."""

from __future__ import annotations

from pathlib import Path

import yaml

from telco_nb.commands.model_card import DATASET, held_against_bar, result_rows
from telco_nb.commands.trained import Trained
from telco_nb.report.files import read_study


def write_eval_results(trained: Trained, folder: Path) -> None:
    """Write `.eval_results/telco-conversations.yaml` into an export; no file if the study has no results yet.

    A task is a metric of the model card, `content` for example. Hubs resolve the data set's name once it is uploaded
    under an account: put the account before it, as in `account/telco-conversations`.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    study = read_study(trained.root, [])
    rows = result_rows(study, trained.config, held_against_bar(trained))
    if not rows:
        return
    day = study.manifests["study", "06_analysis"]["started_at"][:10]
    entries = [
        EvalResultEntry(DATASET, row.name.replace(" ", "_"), row.value, date=day, notes=row.about) for row in rows
    ]
    path = folder / ".eval_results" / f"{DATASET}.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
