"""Which rules of the checklist another judge goes along with, such as readers who vote blind."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

from telco_nb.analysis.results import JudgeResults
from telco_nb.analysis.statements import Finding, counted
from telco_nb.analysis.statistics import read_comparisons, share_interval
from telco_nb.judge.checklist import FAULT_GAP, TIE_BAND

POINT_BANDS = (0.0, TIE_BAND, 0.2, 0.4, math.inf)  # of the difference in the share of points; a point is about a third
EVEN = 0.5  # the share that a rule without any meaning for the other judge would have
FLAG_RULES = {  # what an answer without the flag is
    "off_request": "no step of another problem", "off_topic": "on topic", "repeats_itself": "no sentence twice",
    "unclean_end": "not cut off", "term_missing": "names the term", "unknown_figure": "no unknown figure",
    "contradiction": "no contradiction", "wrong_belief": "no wrong belief", "asks_for_secret": "asks for no secret",
    "too_long_or_short": "of fitting length", "list": "no list",
}  # fmt: skip


class _Pairs(NamedTuple):
    """Comparisons that a judge has decided: the checks of both answers, and 1 where it prefers the first, else -1."""

    first: pd.DataFrame
    second: pd.DataFrame
    prefers: np.ndarray

    def less(self, column: str) -> np.ndarray:
        """The first answer's value less the second's, rounded as `verdict_by_score` does."""
        return np.round(self.first[column].to_numpy(float) - self.second[column].to_numpy(float), 9)


def rule_agreement(checks: pd.DataFrame, judgements: pd.DataFrame, seed: int) -> pd.DataFrame:
    """How often a judge prefers the answer that a rule of the checklist speaks for.

    Args:
        checks: `checklist.checks_table` of the same answers.
        judgements: of the other judge: purpose, source, prompt_id, config_first, config_second, winner. Ties are left
            out, and so are empty and looping answers that lose by rule: nobody has read those.
        seed: of the bootstrap over terms.

    Returns:
        One row per rule that some comparison turns on: rule, comparisons, agreed (share, 0 to 1) and its interval
        agreed_low, agreed_high, missing with too few comparisons. A flag's row counts all comparisons in which one
        answer has the flag, whatever else differs.
    """
    pairs, terms = _decided(checks, judgements)
    rows = []
    for rule, speaks in _rules(pairs).items():
        turned = speaks != 0
        if turned.any():
            right = pd.Series(speaks[turned] == pairs.prefers[turned])
            share = share_interval(right, terms[turned].reset_index(drop=True), seed)
            rows.append((rule, int(turned.sum()), *share))
    return pd.DataFrame(rows, columns=["rule", "comparisons", "agreed", "agreed_low", "agreed_high"])


def _decided(checks: pd.DataFrame, judgements: pd.DataFrame) -> tuple[_Pairs, pd.Series]:
    known = checks.set_index(["config", "prompt_id"])
    rows = read_comparisons(judgements)
    rows = rows[rows["winner"] != "tie"]
    keys = [list(zip(rows[f"config_{seat}"], rows["prompt_id"], strict=True)) for seat in ("first", "second")]
    kept = np.array([a in known.index and b in known.index for a, b in zip(*keys, strict=True)], dtype=bool)
    rows = rows[kept]
    first, second = (known.loc[[key for key, keep in zip(of, kept, strict=True) if keep]] for of in keys)
    return _Pairs(first, second, np.where(rows["winner"] == rows["config_first"], 1, -1)), first["term_id"]


def _rules(pairs: _Pairs) -> dict[str, np.ndarray]:
    """By rule: 1 where it speaks for the first answer, -1 for the second, 0 where it says nothing."""
    points, safety = pairs.less("coverage"), -pairs.less("unsafe")
    rules = {"safe, the other is not": safety}
    for low, high in pairwise(POINT_BANDS):
        in_band = (np.abs(points) >= low) & (np.abs(points) < high) & (safety == 0)
        by = f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}" if low else f"less than {high:g}"
        rules[f"more points, by {by}"] = np.sign(points) * in_band
    equal = (np.abs(pairs.less("content")) < TIE_BAND) & (np.abs(pairs.less("faultless")) >= FAULT_GAP)
    rules["fewer faults, at equal content"] = np.sign(pairs.less("faultless")) * equal
    flags = [side["flags"].astype(str).str.split("; ") for side in (pairs.first, pairs.second)]
    for flag in sorted({flag for side in flags for found in side for flag in found} - {"", "unsafe"}):
        has = [np.array([flag in found for found in side], dtype=float) for side in flags]
        rules[FLAG_RULES.get(flag, f"not {flag}")] = has[1] - has[0]
    return rules


def rule_finding(judge: JudgeResults, table: pd.DataFrame) -> Finding:
    """By which rules the judge prefers the better answer more often than a coin, and by which less often."""
    known = table.dropna(subset=["agreed_low", "agreed_high"])
    along, against = known[known["agreed_low"] > EVEN], known[known["agreed_high"] < EVEN]
    text = (
        f"Of {counted(len(known), 'thing')} that the checklist looks at in answers, {judge.label} prefers the better "
    )
    text += f"answer more often than a coin by {len(along) or 'none'}{_named(along)}; less often by "
    text += f"{len(against) or 'none'}{_named(against)} (95 % intervals, not adjusted for their number)."
    blocks = list(judge.blocks)
    return Finding(f"rules.{judge.name}", text, verdict="blocked" if blocks else "described", blocked_by=blocks)


def _named(rows: pd.DataFrame) -> str:
    columns = zip(rows["rule"], rows["agreed"], rows["comparisons"], strict=True)
    texts = [f"{rule} ({share:.0%} of {n})" for rule, share, n in columns]
    return f": {'; '.join(texts)}" if texts else ""
