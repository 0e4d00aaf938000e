"""Which rules of the checklist readers go along with: planted preferences are found, and none is made up."""

import fake_study
import numpy as np
import pandas as pd
import pytest

from telco_nb.analysis import findings, rules

N = 1200


def study(seed, follows):
    """Checks of two answers to each of N questions, and decisions of a reader with `follows(first, second) -> odds`."""
    rng = np.random.default_rng(seed)
    prompts, terms = [f"p{i}" for i in range(N)], [f"t{i % 52}" for i in range(N)]

    def answers(config):
        flags = rng.choice(["", "off_request", "unclean_end"], N, p=[0.7, 0.15, 0.15])
        style = 1 - (flags == "unclean_end") / 3
        coverage = rng.choice([0.0, 0.15, 0.3, 0.6], N)
        columns = {"coverage": coverage, "content": coverage, "style": style, "faultless": style, "unsafe": False}
        return pd.DataFrame({"config": config, "prompt_id": prompts, "term_id": terms, **columns, "flags": flags})

    first, second = answers("c01"), answers("c02")
    prefers = rng.random(N) < 1 / (1 + np.exp(-follows(first, second)))
    judgements = pd.DataFrame(
        {
            "purpose": "ranking", "source": "judge", "prompt_id": prompts,
            "config_first": "c01", "config_second": "c02", "winner": np.where(prefers, "c01", "c02"),
        }
    )  # fmt: skip
    return pd.concat([first, second]), judgements


SCORES = pd.Series({"c01": 0.1, "c02": -0.1})
READER = fake_study.make_judge(SCORES, name="panel", kind="language_model_panel")
CHECKLIST = fake_study.make_judge(SCORES)


def statement(made):
    checks, judgements = made
    table, told = findings.rule_findings([CHECKLIST, READER], checks, {READER.name: judgements}, 1)
    assert set(table["judge"]) == {READER.label}
    return told[0]


def test_a_judge_that_failed_its_gate_is_not_told_as_a_reader():
    checks, judgements = study(6, lambda first, second: np.zeros(N))
    failed = fake_study.make_judge(SCORES, name="panel", kind="embedding", gate_passed=False, headline_blocks=("so",))
    _, told = findings.rule_findings([CHECKLIST, failed], checks, {"panel": judgements}, 1)
    assert told[0].verdict == "blocked" and told[0].blocked_by


def has(answers, flag):
    return (answers["flags"] == flag).astype(float)


def told(checks, judgements, seed=1):
    return rules.rule_agreement(checks, judgements, seed).set_index("rule")


def test_a_reader_who_wants_points_and_whole_answers_and_likes_other_problems_steps_is_read_so():
    def follows(first, second):
        points = 3 * (first["coverage"] - second["coverage"])
        return points + sum(w * (has(second, f) - has(first, f)) for f, w in (("unclean_end", 2), ("off_request", -2)))

    table = told(*study(1, follows))
    assert table.loc["more points, by 0.4 or more", "agreed_low"] > 0.5
    assert table.loc["fewer faults, at equal content", "agreed_low"] > 0.5
    assert table.loc["not cut off", "agreed_low"] > 0.5 > table.loc["no step of another problem", "agreed_high"]
    assert "safe, the other is not" not in table.index  # nothing turned on it
    finding = statement(study(1, follows))
    along, _, against = finding.statement.partition("; less often by ")
    assert finding.verdict == "described" and "no step of another problem" in against and "not cut off" in along


def test_of_a_reader_who_tosses_coins_the_intervals_hold_one_half_for_95_percent_of_all_rules():
    held = [
        row.agreed_low <= 0.5 <= row.agreed_high
        for seed in range(40)
        for row in told(*study(seed, lambda first, second: np.zeros(N))).itertuples()
    ]
    assert len(held) >= 200 and np.mean(held) >= 0.94


def test_the_share_is_that_of_a_count_by_hand_and_does_not_depend_on_the_seats():
    checks, judgements = study(3, lambda first, second: 4 * (first["coverage"] - second["coverage"]))
    table = told(checks, judgements)
    by = {config: rows.set_index("prompt_id") for config, rows in checks.groupby("config")}
    right = [
        (by["c01"].coverage[row.prompt_id] > by["c02"].coverage[row.prompt_id]) == (row.winner == "c01")
        for row in judgements.itertuples()
        if abs(by["c01"].coverage[row.prompt_id] - by["c02"].coverage[row.prompt_id]) >= 0.4
    ]
    shown = table.loc["more points, by 0.4 or more"]
    assert (shown.comparisons, shown.agreed) == (len(right), pytest.approx(np.mean(right)))
    swapped = judgements.rename(columns={"config_first": "config_second", "config_second": "config_first"})
    pd.testing.assert_frame_equal(told(checks, swapped), table)


def test_ties_unread_answers_and_pairs_with_texts_that_were_not_checked_say_nothing():
    checks, judgements = study(4, lambda first, second: first["coverage"] - second["coverage"])
    other = judgements.head(5).assign(config_first="gold", winner="gold")
    unread = judgements.head(5).assign(source="rule")
    ties, anchor = judgements.head(5).assign(winner="tie"), judgements.head(5).assign(purpose="anchor")
    pd.testing.assert_frame_equal(
        told(checks, pd.concat([judgements, other, ties, anchor, unread])), told(checks, judgements)
    )
    assert rules.rule_agreement(checks, ties, 1).empty


def test_nothing_is_said_without_a_checklist_without_a_reader_and_without_decisions():
    checks, judgements = study(5, lambda first, second: np.zeros(N))
    for readers, known, votes in (([READER], None, judgements), ([CHECKLIST], checks, judgements)):
        assert findings.rule_findings(readers, known, {READER.name: votes}, 1)[1] == []
    assert findings.rule_findings([CHECKLIST, READER], checks, {READER.name: judgements.head(0)}, 1)[1] == []
