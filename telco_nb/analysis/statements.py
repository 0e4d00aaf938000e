"""A statement of the study with its value, interval and verdict, and the helpers that word one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from telco_nb.analysis.results import JudgeResults
from telco_nb.analysis.statistics import Interval


@dataclass(frozen=True)
class Finding:
    """One statement.

    `n` is the number of independent units behind it: the configurations or runs that are compared, the terms that were
    resampled, or the pairs or answers that two judges share. It is never a number of draws, which can be made as large
    as one likes; None where the units are not counted. `low` and `high` are 95 % bounds. `verdict`: supported, refuted,
    not distinguishable, cannot tell (of the decision and the primary claim), not fit, described, not estimable or
    blocked.
    """

    id: str
    statement: str
    value: float | str | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    verdict: str = "described"
    blocked_by: list[str] = field(default_factory=list)


def not_estimable(id: str, text: str, reason: str, n: int | None = None, verdict: str = "not estimable") -> Finding:
    """A finding that gives the reason why there are no numbers."""
    return Finding(id, f"{text}: {reason}.", n=n, verdict=verdict, blocked_by=[reason])


def blockable(
    id: str,
    text: str,
    interval: Interval,
    n: int | None,
    verdict: str,
    *judges: JudgeResults,
    blocks: Sequence[str] = (),
) -> Finding:
    """A finding that rests on judges, or on an energy with `blocks`: blocked if one of them is."""
    blocked_by = [block for judge in judges for block in judge.blocks] + list(blocks)
    return Finding(id, text, *interval, n, "blocked" if blocked_by else verdict, blocked_by)


def counted(n: int, noun: str) -> str:
    """`1 configuration`, `0 configurations`, `1,000 pairs`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def some_of(n: int, total: int, noun: str, one: str, more: str) -> str:
    """`none of 16 configurations has`, `1 of 16 configurations has`, `2 of 16 configurations have`: the verb follows n.

    Args:
        n, total: the counts.
        noun: of the total, in the singular.
        one, more: the verb after one and after several.
    """
    return f"{n or 'none'} of {counted(total, noun)} {more if n > 1 else one}"


def excludes_zero(interval: Interval) -> str:
    """The verdict on a difference: supported if its interval excludes 0."""
    return "supported" if interval.excludes() else "not distinguishable"


def p_text(p: float) -> str:
    """`p = 0.031`, or `p < 0.001`."""
    if math.isnan(p):
        return "p not known"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
