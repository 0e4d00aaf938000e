"""The primary claim: the one statement that was written down before the run, with its margin and its rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from telco_nb.analysis.loss_findings import loss_pick
from telco_nb.analysis.recommendation import claiming_judges, claims_of, compare
from telco_nb.analysis.results import StudyResults
from telco_nb.analysis.statements import Finding, name_list, not_estimable
from telco_nb.judge.ranking import interval_text

VERDICTS = {"supported": "Upheld", "refuted": "Refuted", "cannot tell": "The data cannot tell"}


def primary_finding(study: StudyResults, changed: Sequence[str] = ()) -> Finding:
    """The primary claim with its answer: supported (upheld), refuted, cannot tell, or blocked.

    `changed` names the jobs that ran when the file of claims was another one: what was changed after the run was not
    written down before it, so it is blocked.

    The lead is that of the best other configuration over the choice of loss, with bounds that hold for all
    configurations at once. Of several judges the least certain one gives the numbers.
    """
    claims, (judges, blocks) = claims_of(study), claiming_judges(study)
    late = f" (changed after the run: {name_list(_first(changed))} ran with another file of claims)" if changed else ""
    text, pick = f"Primary claim{late}: {claims.claim}", loss_pick(study.losses) if len(study.losses) else None
    judges = [judge for judge in judges if pick in judge.scores.index]
    if pick is None or not judges:
        reason = "; ".join(blocks) or "no judge has ranked it"
        return not_estimable("primary", f"{text} No answer", reason if pick else "no loss is the lowest", 0, "blocked")
    leads = {}
    for label, table in compare(study, judges).items():
        ahead = max(0.0, table["score"].drop(pick).max() - table.loc[pick, "score"]) if len(table) > 1 else 0.0
        leads[label] = ahead, table.loc[pick, "behind_at_least"], table.loc[pick, "behind_at_most"]
    upheld = all(high <= claims.margin for _, _, high in leads.values())
    refuted = all(low > claims.margin for _, low, _ in leads.values())
    verdict = "supported" if upheld else "refuted" if refuted else "cannot tell"
    told = [f"{_lead_text(*lead)} with {label}" for label, lead in leads.items()]
    by = "By the changed claim: " if changed else ""
    text += f" {by}{VERDICTS[verdict]}: {pick} is behind the best of the others by {name_list(told)} (log-odds; "
    text += f"bounds hold for all configurations at once; up to {claims.margin:g} counts as equal)."
    least = max(leads.values(), key=lambda lead: lead[2] - lead[1])
    alone = [label for label, (_, low, _) in leads.items() if low > claims.margin]
    if verdict == "cannot tell" and alone:
        text += (
            f" By {name_list(alone)} alone it would be refuted; the rule, written before the run, needs every judge."
        )
    blocked = ["the claim was changed after the run"] if changed else []
    return Finding("primary", text, *least, len(study.losses), "blocked" if changed else verdict, blocked)


def _first(jobs: Sequence[str], most: int = 2) -> list[str]:
    """The names of a few jobs, and how many more there are."""
    return [*jobs[:most], *([f"{len(jobs) - most} more"] if len(jobs) > most else [])]


def _lead_text(value: float, low: float, high: float) -> str:
    return f"{value:.2f} {interval_text(low, math.nan if math.isinf(high) else high, '.2f')}"
