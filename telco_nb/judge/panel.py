"""Opens the judge that a parameter file describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from telco_nb.hosted.api import KEY_VARIABLES
from telco_nb.judge.cases import Judge, OfflineJudge
from telco_nb.judge.checklist import ChecklistJudge
from telco_nb.judge.embedding import EmbeddingJudge
from telco_nb.judge.language_model import LanguageModelJudge
from telco_nb.judge.people import HumanJudge, LanguageModelPanelJudge
from telco_nb.study.params import ParameterError

OFFLINE_JUDGES: dict[str, type[OfflineJudge]] = {
    "checklist": ChecklistJudge,
    "embedding": EmbeddingJudge,
    "human": HumanJudge,
    "language_model_panel": LanguageModelPanelJudge,
}


def open_judge(
    values: Mapping[str, Any], root: Path, max_usd: float | None = None
) -> OfflineJudge | LanguageModelJudge:
    """Opens the judge that the parameters of a file in params/judges describe.

    Args:
        values: the parameters; judge, judge_kind, judge_model and judge_endpoint choose the judge.
        root: the study's folder `outputs/<profile>`; its stores record the dollars that were spent.
        max_usd: the most that the whole study may spend on hosted models, in dollars; None for no limit.

    Raises:
        ParameterError: the kind is unknown, or has a setting that it cannot use.
    """
    kind = values["judge_kind"]
    if kind in KEY_VARIABLES:
        return LanguageModelJudge.from_parameters(values, root, max_usd)
    if kind not in OFFLINE_JUDGES:
        known = ", ".join([*OFFLINE_JUDGES, *KEY_VARIABLES])
        raise ParameterError(f"judge {values['judge']!r}: unknown judge_kind {kind!r}. Known: {known}.")
    return OFFLINE_JUDGES[kind](values["judge"], values["judge_model"], values["judge_endpoint"])


def judge_label(judge: Judge) -> str:
    """The judge's name for tables and findings; the name of an offline proxy says that it is one."""
    return f"{judge.name} (offline proxy)" if judge.is_proxy else judge.name
