"""The effective number of judges is what was planted, and 1 for a judge and its copy."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from telco_nb.analysis.agreement import effective_finding, effective_judges

CONFIGS = ["c01", "c02", "c03", "c04"]
BETTER = dict(zip(CONFIGS, (1.2, 0.4, -0.3, -1.0), strict=True))


def judged(n_prompts, share, n_judges, seed):
    """Verdicts of judges who see how good a configuration is, and whose luck correlates `share` with the others'."""
    draw = np.random.default_rng(seed)
    rows = [[] for _ in range(n_judges)]
    for prompt in range(n_prompts):
        for i, a in enumerate(CONFIGS):
            for b in CONFIGS[i + 1 :]:
                common = draw.normal()
                for table in rows:
                    luck = math.sqrt(share) * common + math.sqrt(1 - share) * draw.normal()
                    seats = (a, b) if draw.random() < 0.5 else (b, a)
                    winner = a if BETTER[a] - BETTER[b] + luck > 0 else b
                    table.append((f"p{prompt}", f"s{prompt // 2}", *seats, "ranking", winner))
    columns = ["prompt_id", "scenario_id", "config_first", "config_second", "purpose", "winner"]
    return [pd.DataFrame(table, columns=columns) for table in rows]


@pytest.mark.parametrize("n_judges", [2, 3])
def test_a_judge_and_its_copies_count_once_and_strangers_each(n_judges):
    (one,) = judged(60, 0.0, 1, 1)
    number, r, n = effective_judges([one] * n_judges, 200, 1)
    assert number == pytest.approx((1, 1, 1)) and r.value == pytest.approx(1) and n == 360
    number, r, _ = effective_judges(judged(150, 0.0, n_judges, 2), 200, 1)
    assert number.low <= n_judges <= number.high + 1e-9 and number.value > 0.9 * n_judges


def test_who_is_better_does_not_count_as_shared_luck():
    """Both see the same large differences and share no luck: their verdicts agree, and yet they are two judges."""
    tables = judged(150, 0.0, 2, 3)
    agree = (tables[0]["winner"] == tables[1]["winner"]).mean()
    number, _, _ = effective_judges(tables, 200, 1)
    assert agree > 0.6 and number.value > 1.8


def test_the_planted_correlation_lies_in_its_interval():
    """Of normal luck cut at a threshold in the middle, verdicts correlate 2 / pi * asin(share); less at its ends."""
    hits = 0
    for seed in range(40):
        flat = dict.fromkeys(CONFIGS, 0.0)
        before = dict(BETTER)
        BETTER.update(flat)
        try:
            _, r, _ = effective_judges(judged(60, 0.5, 2, seed), 200, seed)
        finally:
            BETTER.update(before)
        hits += r.low <= 2 / math.pi * math.asin(0.5) <= r.high
    assert hits >= 34  # 95 % of 40 are 38; 33 or fewer have a chance of 1 %


def test_few_or_equal_verdicts_are_no_number():
    panel = [SimpleNamespace(label="checklist"), SimpleNamespace(label="panel")]
    tables = judged(4, 0.5, 2, 1)
    found = effective_finding(panel, *effective_judges(tables, 100, 1))
    assert found.verdict == "not estimable" and "24 comparisons" in found.statement
    ties = [table.assign(winner=None) for table in judged(30, 0.5, 2, 1)]
    number, r, n = effective_judges(ties, 100, 1)
    assert math.isnan(number.value) and math.isnan(r.value) and n == 180
    nothing = effective_judges([table[table["purpose"] == "retest"] for table in tables], 100, 1)
    assert nothing[2] == 0 and effective_finding(panel, *nothing).verdict == "not estimable"


def test_the_sentence_gives_number_correlation_and_comparisons():
    panel = [SimpleNamespace(label="checklist"), SimpleNamespace(label="panel")]
    number, r, n = effective_judges(judged(60, 0.4, 2, 5), 200, 1)
    said = effective_finding(panel, number, r, n)
    assert said.value == number.value and said.n == 360 and said.verdict == "described"
    assert f"count as {number.value:.2f}" in said.statement and "360 shared comparisons" in said.statement
