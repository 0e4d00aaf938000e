"""The bias of a judge: preference for a seat, for long answers and for ties, and its consistency."""

from __future__ import annotations

import numpy as np
import pandas as pd

from telco_nb.judge.store import FIT_PURPOSES


def bias_observations(judged: pd.DataFrame) -> pd.DataFrame:
    """The observations of bias in every verdict; their means are the shares that 05_judge shows.

    Args:
        judged: the verdicts on a plan of pairs (`store.judged_rows`).

    Returns:
        One row per verdict, with columns from 0 to 1, NaN where an observation does not apply: first_seat (the first
        seat won; a tie counts 0.5), tie, longer_wins (the longer answer won; no ties, no equal lengths),
        swap_consistent and retest_consistent (the winner is the same as in the first question on this pair).
    """
    fit_rows = judged["purpose"].isin(FIT_PURPOSES)
    tie = judged["verdict"] == "tie"
    first_won = (judged["verdict"] == "A").astype(float)
    longer_first = np.sign((judged["words_first"] - judged["words_second"]).astype(float))
    table = judged[["judgement_id", "purpose", "term_id", "scenario_id"]].copy()
    table["first_seat"] = (first_won + tie / 2).where(fit_rows)
    table["tie"] = tie.astype(float).where(fit_rows)
    decided = fit_rows & ~tie & (longer_first != 0)
    table["longer_wins"] = (first_won == (longer_first > 0)).astype(float).where(decided)
    pair = [tuple(sorted(p)) for p in zip(judged["config_first"], judged["config_second"], strict=True)]
    key = list(zip(judged["prompt_id"], pair, strict=True))
    base = {k: w for k, w, p in zip(key, judged["winner"], judged["purpose"], strict=True) if p == "ranking"}
    original = pd.Series([base.get(k) for k in key], index=judged.index, dtype=object)
    same = (original == judged["winner"]).astype(float).where(original.notna())
    table["swap_consistent"] = same.where(judged["purpose"] == "swap")
    table["retest_consistent"] = same.where(judged["purpose"] == "retest")
    return table
