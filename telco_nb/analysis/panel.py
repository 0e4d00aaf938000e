"""The judges of a study as its analysis reads them: one way for 06_analysis and for what is said after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from telco_nb.analysis.results import JudgeResults, read_judge
from telco_nb.analysis.seeds import merge_runs

JudgeFiles = Callable[[str], Callable[[str], Path]]  # by a judge's name: the path of a file of its 05_judge


def read_panel(judges: Sequence[str], files: JudgeFiles, seed: int) -> list[JudgeResults]:
    """The results of the judges, one row for each configuration.

    Args:
        judges: their names.
        files: where their files are.
        seed: of the analysis, for the drawn luck of training.
    """
    return [merge_runs(read_judge(name, files(name)), seed) for name in judges]


def panel_checks(panel: Sequence[JudgeResults], files: JudgeFiles) -> pd.DataFrame | None:
    """What the first checklist that passed its gate found in each answer; None without one."""
    valid = [judge.name for judge in panel if judge.kind == "checklist" and judge.gate_passed]
    return pd.read_parquet(files(valid[0])("tables/checks.parquet")) if valid else None
