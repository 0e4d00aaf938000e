"""Adapters made weaker or stronger: the best strength, paired by term, and words where none was computed."""

import numpy as np
import pandas as pd
import pytest

from telco_nb.analysis.strengths import strength_findings, strength_roles, strength_table

STRENGTHS = (0.5, 0.75, 1.0, 1.25)


def losses(best: float, size: float = 1.0) -> pd.DataFrame:
    """Hard and easy terms with one curve around the best strength."""
    rng = np.random.default_rng(1)
    hard = np.linspace(1, 4, 24)
    rows = [
        (s, f"p{i}", f"t{i // 2}", 20, 20 * (hard[i] + size * (s - best) ** 2 + rng.normal(0, 0.01)))
        for s in STRENGTHS
        for i in range(24)
    ]
    return pd.DataFrame(rows, columns=["strength", "prompt_id", "term_id", "n_tokens", "loss_sum"])


def test_a_weaker_adapter_with_a_lower_loss_is_found_with_a_paired_interval():
    roles = {"c01": "front-runner", "c02": "with the lowest loss"}
    table = strength_table({"c01": losses(0.7), "c02": losses(1.0)}, roles, 300, 1)
    assert len(table) == 8 and list(table["config"].unique()) == ["c01", "c02"]
    found = {f.id: f for f in strength_findings(table, roles)}
    weaker = found["strength.c01"]
    assert "lowest at 0.75" in weaker.statement and weaker.verdict == "supported"
    assert "not told apart" not in weaker.statement and "on 24 answers" in weaker.statement
    low, own = (table.query("config == 'c01' and strength == @s")["loss"].item() for s in (0.75, 1.0))
    assert f"{low:.3f} nats per token, against {own:.3f} at 1" in weaker.statement
    assert abs(weaker.value - (0.05**2 - 0.3**2)) < 0.02 and weaker.high - weaker.low < 0.03
    assert "lowest at 1: " in found["strength.c02"].statement and found["strength.c02"].low > 0


@pytest.mark.parametrize("best", [0.86, 0.89])
def test_two_strengths_whose_interval_holds_0_are_not_told_apart_and_both_losses_are_given(best):
    table = losses(best, 0.02).query("strength in (0.75, 1)")
    roles = {"c01": "front-runner"}
    found = strength_findings(strength_table({"c01": table}, roles, 300, 1), roles)[0]
    assert "on 24 answers" in found.statement  # two of each of 12 terms, which are the units
    assert found.low < 0 < found.high and found.verdict == "not distinguishable" and found.n == 12
    assert "not told apart on 24 answers" in found.statement
    assert found.statement.count(" at 1") >= 1 and " at 0.75" in found.statement


def test_the_interval_of_no_change_holds_0():
    row = strength_table({"c01": losses(1.0)}, {"c01": "front-runner"}, 300, 1).set_index("strength").loc[1.0]
    assert row["change"] == row["low"] == row["high"] == 0


def test_one_strength_alone_gives_words_and_no_number():
    alone = losses(1.0).query("strength == 1")
    for table in (alone, alone.iloc[:0]):
        shown = strength_table({"c01": table}, {"c01": "front-runner"}, 300, 1)
        found = strength_findings(shown, {"c01": "front-runner"})
        assert shown.empty and found[0].verdict == "not estimable" and found[0].value is None


def test_the_front_runner_and_the_lowest_loss_can_be_the_same():
    loss = pd.Series({"c01": 0.5, "c02": 0.6})
    assert strength_roles("c01", loss) == {"c01": "front-runner, with the lowest loss"}
    assert strength_roles("c02", loss) == {"c01": "with the lowest loss", "c02": "front-runner"}
    assert strength_roles(None, loss[:0]) == {}
