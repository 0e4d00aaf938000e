"""The tables of results: losses with their draws, missing values, whose answers are a judge's own, the gate."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from fake_study import make_judge

from telco_nb.analysis.results import (
    gate_table,
    own_answers,
    results_table,
    self_preference,
    val_loss_draws,
    val_loss_interval,
)
from telco_nb.analysis.statistics import Interval


def losses(per_scenario: np.ndarray, conversations: int = 2, tokens: int = 50) -> pd.DataFrame:
    n = len(per_scenario) * conversations
    scenario = np.arange(n) % len(per_scenario)
    return pd.DataFrame(
        {
            "scenario_id": [f"s{i:03d}" for i in scenario],
            "n_tokens": tokens,
            "loss_sum_after": tokens * per_scenario[scenario],
        }
    )


def test_validation_loss_is_token_weighted():
    frame = pd.DataFrame({"scenario_id": ["a", "b"], "n_tokens": [10, 90], "loss_sum_after": [10.0, 45.0]})
    draws = val_loss_draws({"c": frame}, 50, 0)
    assert val_loss_interval(frame, draws["c"]).value == pytest.approx(0.55)


@pytest.mark.parametrize("scenarios", [12, 60])
def test_loss_interval_covers_the_true_mean_of_scenarios(scenarios):
    rng, hits = np.random.default_rng(2), 0
    for _ in range(300):
        frame = losses(rng.normal(1.0, 0.2, scenarios))
        interval = val_loss_interval(frame, val_loss_draws({"c": frame}, 400, 1)["c"])
        hits += interval.low <= 1.0 <= interval.high
    assert 0.92 <= hits / 300 <= 0.98


def test_configurations_share_their_draws_so_differences_are_paired():
    base = np.random.default_rng(0).normal(1, 0.2, 40)
    draws = val_loss_draws({"a": losses(base), "b": losses(base + 0.01)}, 100, 0)
    assert np.allclose(draws["b"] - draws["a"], 0.01)


def test_results_columns_are_the_agreed_ones_and_missing_stays_empty():
    training = {
        "c01": {"target_modules": "qv", "rank": 8, "epochs": 1, "val_loss": 0.5, "energy_kind": "none"},
        "c02": {},
    }
    judge = make_judge(
        pd.Series({"c01": 0.3, "c03": -0.3}),
        gate_passed=False,
        headline_blocks=("failed its validity gate (no result)",),
    )
    table = results_table(training, {"c01": {"answer_energy_wh": 0.0}}, {"c01": Interval(0.5, 0.4, 0.6)}, [judge])
    expected = (
        "config target_modules rank lora_alpha epochs learning_rate seed train_tokens val_loss val_loss_low "
        "val_loss_high test_loss test_perplexity noisy_loss noisy_perplexity unseen_loss "
        "unseen_perplexity train_energy_wh train_energy_low_wh train_energy_high_wh train_net_energy_wh energy_kind "
        "energy_source train_joules_per_token train_joules_per_supervised_token train_mean_w answer_energy_wh "
        "train_started_at train_seconds tokens_per_second checklist_score checklist_low checklist_high "
        "checklist_rank checklist_rank_low checklist_rank_high checklist_gate"
    )
    assert list(table.columns) == expected.split()
    first, second = table.to_csv(index=False).splitlines()[1:]
    assert first.startswith("c01,qv,8,,1,,,,0.5,0.4,0.6,,,,,,,,,,,none,,,,,0.0,,,,0.3,")
    assert second == "c02" + "," * 36 + "failed"


def test_a_configuration_that_the_judge_left_out_has_no_score():
    judge = make_judge(pd.Series({"c01": 0.3, "c03": -0.3}))
    table = results_table({"c02": {"val_loss": 0.5}}, {}, {}, [judge]).set_index("config")
    assert pd.isna(table.loc["c02", "checklist_score"])
    assert table.loc["c02", "checklist_gate"] == "passed"


def judgements(winners: list[str], purpose: str = "anchor") -> pd.DataFrame:
    """One comparison of `mine` with `theirs` per prompt, and who won it."""
    n = len(winners)
    ids = {"prompt_id": [f"p{i}" for i in range(n)], "scenario_id": [f"s{i}" for i in range(n)], "purpose": purpose}
    return pd.DataFrame(ids | {"config_first": "mine", "config_second": "theirs", "winner": winners})


def test_self_preference_is_the_surplus_over_the_other_judges():
    vain = judgements(["mine"] * 30 + ["theirs"] * 10)
    other = judgements(["mine"] * 10 + ["tie"] * 20 + ["theirs"] * 10)
    swapped = other.rename(columns={"config_first": "config_second", "config_second": "config_first"})
    for others in ([other], [swapped], [other, other]):
        gap, n = self_preference(vain, others, {"mine"}, 200, 0)
        assert gap.value == pytest.approx(30 / 40 - 20 / 40) and n == 40
        assert 0 < gap.low < gap.value < gap.high
    assert self_preference(vain, [], {"mine"}, 50, 0)[1] == 0
    assert self_preference(vain, [other], {"mine", "theirs"}, 50, 0)[1] == 0  # own against own says nothing


def test_whose_answers_are_a_judges_own():
    configs = ["c01", "c02"]
    assert own_answers("checklist", None, "tiny", None, configs) == set()
    assert own_answers("embedding", "mini", "tiny", None, configs) == {"reference"}
    assert own_answers("openai-compatible", "tiny", "tiny", None, configs) == {"c01", "c02", "untuned"}
    assert own_answers("anthropic", "big", "tiny", "big", configs) == {"reference"}


def test_the_gate_is_shown_control_by_control_for_every_judge():
    def control(name, value, passed):
        return {"control": name, "value": value, "rule": ">=", "threshold": 0.95, "n": 40, "passed": passed}

    score = pd.Series({"c01": 1.0, "c02": 0.0})
    good = make_judge(
        score,
        controls=(
            control("truncated", 0.975, True),
            control("wrong_number", 1.0, True),
            control("wrong_term", None, None),
        ),
    )
    bad = make_judge(
        score, name="embedding", controls=(control("wrong_number", 0.75, False), control("late", None, False))
    )
    table = gate_table([good, bad]).set_index("control")
    assert table.loc["wrong_number", "embedding (offline proxy)"] == "0.750 (n = 40) FAILED"
    assert table.loc["truncated", "checklist (offline proxy)"] == "0.975 (n = 40) passed"
    assert table.loc["late", "embedding (offline proxy)"] == "no verdict: FAILED"
    assert pd.isna(table.loc["late", "checklist (offline proxy)"])
    assert table.loc["wrong_term", "checklist (offline proxy)"] == "not asked" and good.failed_controls == []
    assert good.gate_text == "2 of 3 controls asked" and bad.failed_controls == ["wrong_number", "late"]
