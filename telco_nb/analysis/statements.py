"""A statement of the study with its value, interval and verdict, and the helpers that word one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from telco_nb.analysis.results import JudgeResults
from telco_nb.analysis.statistics import Interval

# The words that a reader may not know, each with the pattern that finds it; every page explains those that it uses.
WORDS = {
    "LoRA": ("LoRA", "trains small added matrices instead of the whole model; its rank is the smaller side of these"),
    "validation loss": ("validation loss", "how much answers surprise a model that was not trained on them, in nats "
                        "per token; lower is better"),
    "gold answers": ("gold", "the answers written out beforehand, one to each question: what a full answer says"),
    "offline proxy": ("proxy|proxies", "a judge that is a program, of rules or of text likeness, and stands in for a "
                      "human reader"),
    "panel": ("panel", "a judge: readers that are language models outside this project; they voted on blind pairs of "
              "answers, and which models they are is not known to the record"),
    "brackets": (r"\d+%? \[", "95 % bounds of one value alone; a verdict also allows for the design and for how many "
                 "values were tested together, so a value can be `not distinguishable` although its brackets leave 0 "
                 "out"),
    "kappa": ("kappa", "how far two judges agree beyond chance, verdict by verdict: 1 always, 0 as chance would"),
    "unsafe": ("unsafe", "an answer that leaves out a protective step, asks for a secret, or says what must not be "
               "said"),
    "decided comparisons": ("decided comparisons", "the pairs of answers of which the judge prefers one"),
    "log-odds": ("log-odds", "the unit of scores: a lead of 0 wins 50 % of decided comparisons, a lead of 1 wins 73 %, "
                 "a lead of 2 wins 88 %"),
    "expected score": ("expected score", "a score drawn towards what the factors of the configuration predict, "
                       "because the best of many noisy scores is too high"),
    "tau-b": (r"tau\b", "how alike two orders are: +1 the same, 0 no relation, -1 the reverse; of loss and score, -1 "
              "means that a lower loss always goes with better answers"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One statement.

    `n` is the number of independent units behind it: the configurations or runs that are compared, the terms that were
    resampled, or the pairs or answers that two judges share. It is never a number of draws, which can be made as large
    as one likes; None where the units are not counted. `low` and `high` are 95 % bounds; of `fitness.*` over several
    configurations they are the least and the greatest share. `verdict`: supported, refuted, not distinguishable, cannot
    tell (of the decision and the primary claim), not fit, described, not estimable or blocked.
    """

    id: str
    statement: str
    value: float | str | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    verdict: str = "described"
    blocked_by: list[str] = field(default_factory=list)


def words_of(texts: Iterable[str | None]) -> list[tuple[str, str]]:
    """(word, meaning) of each of `WORDS` that stands in one of the texts."""
    whole = "\n".join(text for text in texts if text)
    return [(word, meaning) for word, (pattern, meaning) in WORDS.items() if re.search(rf"\b(?:{pattern})", whole)]


def name_list(names: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`; `last` is the word before the last one."""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


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
