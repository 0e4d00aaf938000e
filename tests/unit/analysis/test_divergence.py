"""What is said about loss and quality: planted reasons are found, unrelated studies give none, and ties give words."""

from __future__ import annotations

import dataclasses
import json
import re

import fake_study
import numpy as np
import pandas as pd
import pytest
from fake_study import make_judge, make_study
from test_inference import DESIGN, driven

from telco_nb.analysis import divergence, effects, findings, results, statistics
from telco_nb.analysis.divergence import divergence_finding, divergence_table
from telco_nb.analysis.parting import explanations
from telco_nb.analysis.results import StudyResults

SIZES = (0.5, 0.5, 2.0, 1.0)  # of the factors' effects: the number of epochs is the strongest everywhere
EQUAL = make_study(16, val_loss=0.5)


def told(study: StudyResults) -> dict[str, findings.Finding]:
    return {found.id: found for found in findings.all_findings(study)}


def drawn(rng: np.random.Generator, values: np.ndarray, noise: float) -> pd.DataFrame:
    return pd.DataFrame(values + noise * rng.normal(size=(100, 16)), columns=DESIGN.index)


def measured(rng: np.random.Generator, **scores: np.ndarray) -> StudyResults:
    """A study whose numbers are given (val, test, score, gap, content, style), each driven by the factors otherwise."""
    given = {
        name: scores.get(name, driven(rng, SIZES, 0.3, 0.5)) for name in ("val", "score", "gap", "style", "content")
    }
    given["test"] = scores.get("test", given["val"] + 0.2 * rng.normal(size=16))
    losses = {"val_loss": given["val"], "test_loss": given["test"], "noisy_loss": given["test"], "unseen_loss": np.nan}
    study = make_study(16, [make_judge(pd.Series(given["score"], DESIGN.index), 0.2)], **losses)
    rows = [(c, f"t{t}", i) for i, c in enumerate(DESIGN.index) for t in range(12)]
    checks = pd.DataFrame(rows, columns=["config", "term_id", "place"])
    checks["coverage"] = checks["unsafe"] = np.nan
    for name in ("content", "style"):
        checks[name] = given[name][checks["place"]] + 0.5 * rng.normal(size=len(checks))
    return dataclasses.replace(
        study,
        checks=checks,
        loss_draws=drawn(rng, given["val"], 0.2),
        set_draws={"test_loss": drawn(rng, given["test"], 0.2)},
        train_losses=pd.Series(given["val"] - given["gap"], DESIGN.index),
    )


def shown(study: StudyResults) -> list[str]:
    return [name for name, one in explanations(study, study.judges[0], {}).items() if one.shown]


@pytest.mark.parametrize("related", [False, True])
def test_studies_without_a_reason_show_one_in_at_most_5_percent(related):
    rng, false, n = np.random.default_rng(8), 0, 120
    for _ in range(n):
        val = driven(rng, SIZES, 0.3, 0.5)
        study = measured(rng, val=val, **({"score": -val + 0.5 * rng.normal(size=16)} if related else {}))
        false += bool(shown(study))
    assert false / n <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / n)


def test_planted_reasons_are_found_and_not_taken_for_each_other():
    rng, found, n = np.random.default_rng(9), {"shift": 0, "overfitting": 0, "style": 0}, 40
    wrong = 0
    for reason in found:
        for _ in range(n):
            val, score, gap = (driven(rng, (1.0, 0.5, 1.0, 0.5), 0.3) for _ in range(3))
            planted = {
                "shift": {"val": val, "score": score, "test": -score + 0.1 * rng.normal(size=16)},
                "overfitting": {"val": val, "gap": 2 * gap, "score": 2 * gap - val},
                "style": {"val": val, "style": -val + 0.1 * rng.normal(size=16)},
            }[reason]
            names = shown(measured(rng, **planted))
            found[reason] += reason in names
            wrong += bool(set(names) - {reason})
    assert found["shift"] >= 0.5 * n and found["overfitting"] >= 0.3 * n and found["style"] >= 0.15 * n
    assert wrong / (3 * n) <= 0.08


def test_the_finding_names_each_set_and_leaves_explanations_to_parting():
    study = measured(np.random.default_rng(1))
    table = divergence_table(study, study.judges[0])
    said = divergence_finding(study, study.judges[0], table)
    assert said.id == "divergence.checklist" and said.verdict == "not distinguishable"
    assert said.value == "not shown" and said.n == 16
    for part in ("for the validation loss", "for the test loss", "is not shown"):
        assert part in said.statement
    for word in ("unseen", "shift", "overfitting", "style", "forgetting"):
        assert word not in said.statement.lower()
    table = table.set_index("name")
    assert "unseen loss not known" in table.loc["unseen_loss", "reason"]
    known = table[table["reason"] == ""]
    assert ((known["low"] <= known["value"]) & (known["value"] <= known["high"]) & (known["p"] >= 1 / 32)).all()


def test_an_answer_set_that_a_draw_leaves_out_is_missing_and_no_score_of_0():
    """A configuration was checked on one term alone: draws without that term have no mean."""
    study = measured(np.random.default_rng(1))
    checks = study.checks
    assert checks is not None
    checks = checks[(checks["config"] != "c01") | (checks["term_id"] == "t0")]
    side = divergence.sides_of(dataclasses.replace(study, checks=checks), study.judges[0], 0)["content"]
    left_out = side.draws["c01"].isna().mean()
    assert 0.2 < left_out < 0.5 and side.draws["c02"].notna().all()  # (11 / 12) ** 12 = .35
    assert side.draws["c01"].nunique() == 1


def test_where_a_low_loss_goes_with_good_answers_nothing_parts():
    rng = np.random.default_rng(3)
    val = driven(rng, (1.0, 0.5, 1.0, 0.5), 0.3)
    study = measured(rng, val=val, score=-val)
    found = told(study)
    assert found["divergence.checklist"].value == "together"
    assert found["tau.checklist"].verdict == "supported"
    assert "no p below 0.031 is possible" in found["tau.checklist"].statement


def test_the_verdict_on_tau_goes_by_the_design_and_never_by_shuffled_configurations():
    """One factor drives both sides: shuffled configurations would call that a relation."""
    rng = np.random.default_rng(4)
    epochs = np.where(DESIGN["epochs"] > 1, 1.0, 0.0)
    loss, score = (sign * 3 * epochs + rng.normal(size=16) for sign in (-1, 1))
    study = make_study(16, [make_judge(pd.Series(score, DESIGN.index))], val_loss=loss)
    assert statistics.permutation_p(loss, score) < 0.05
    found = told(study)["tau.checklist"]
    assert found.verdict == "not distinguishable" and "relabelled in the 32 ways" in found.statement
    assert "shuffled as if no factors joined them" in found.statement
    assert "epochs" in found.statement and "(1: " in found.statement


# ---------------------------------------------------------------- ties, infinities, zeros


def test_equal_losses_choose_nothing_and_say_so():
    found = told(EQUAL)
    for id in ("tau.checklist", "divergence.checklist", "loss_choice", "confidence"):
        assert found[id].verdict == "not estimable" and found[id].value is None
    assert "all 16 losses are equal" in found["tau.checklist"].statement
    assert "16 of 16 configurations share the lowest loss" in found["confidence"].statement
    assert not {"best_loss_rank.checklist", "misplaced.checklist"} & set(found)


def test_a_lowest_loss_that_two_share_is_not_given_to_the_first():
    study = make_study()
    losses = study.losses.copy()
    losses[["c03", "c09"]] = losses.min() - 0.1
    found = told(make_study(16, val_loss=losses))
    assert found["tau.checklist"].value is not None
    assert "shared by c03 and c09" in found["regret.checklist"].statement
    assert found["confidence"].verdict == "not estimable" and "best_loss_rank.checklist" not in found


def test_a_judge_that_ties_everything_gives_no_rank_correlation():
    level = pd.Series(0.0, DESIGN.index)
    found = told(make_study(16, [make_judge(level), make_judge(-fake_study.truth(DESIGN)["loss"], name="other")]))
    assert "all 16 scores are equal" in found["tau.checklist"].statement
    assert found["judges.checklist.other"].verdict == "not estimable"
    text = findings.to_json(list(found.values()))
    assert not re.search(r"\bnan\b", text)
    json.loads(text)


@pytest.mark.parametrize("column", ["val_loss", "test_loss"])
def test_an_infinite_loss_is_refused_by_name(column):
    values = np.where(DESIGN.index == "c05", np.inf, 0.5)
    with pytest.raises(ValueError, match=f"c05 has a {column} of inf: its training diverged"):
        make_study(16, **{column: values})
    if column == "val_loss":
        with pytest.raises(ValueError, match="c05"):
            results.results_table({"c05": {"val_loss": np.inf}}, {}, {}, [])


def test_a_rank_is_read_on_its_surprising_side():
    """Rank 2 of the lowest loss is no surprise: 2 or further down has probability 15 of 16."""
    loss = pd.Series(np.linspace(0.5, 0.7, 16), DESIGN.index)
    score = pd.Series(np.linspace(1, -1, 16), DESIGN.index)
    score["c01"] = score["c02"] - 0.01
    found = told(make_study(16, [make_judge(score, 0.001)], val_loss=loss.to_numpy()))
    assert "a place of 2 or further down would have probability 0.94" in found["best_loss_rank.checklist"].statement
    assert "a place of 16 or further up would have probability 1.00" in found["worst_loss_rank.checklist"].statement


def test_energies_of_zero_give_no_ratio_and_no_effect():
    energy = fake_study.truth(DESIGN)["energy"].where(DESIGN.index != "c04", 0.0)
    study = make_study(16, train_energy_wh=energy)
    found = told(study)
    assert "c04 has an energy of 0 Wh" in found["energy_ratio"].statement
    about = [f for id, f in found.items() if id.startswith("effect.trainingenergy")]
    assert about and all("there is no ratio" in f.statement for f in about)
    paper = findings.paper_table(study).set_index("quantity")["this study"]
    assert "factor" not in paper["training energy per configuration"]
    assert np.isnan(effects.energy_ratio(study, "c16", "c04").value)


def with_repeats(study: StudyResults, noise: float, seed: int = 0) -> StudyResults:
    rng, configs = np.random.default_rng(seed), ["c06", "c06", "c11", "c11"]
    energy = study.energy[configs].to_numpy() * np.exp(noise * rng.normal(size=4))
    frame = pd.DataFrame({"config": configs, "seed": [1, 2, 1, 2], "val_loss": 0.5, "train_energy_wh": energy})
    return dataclasses.replace(study, repeats=frame)


def test_the_energy_ratio_has_the_error_between_runs_or_says_that_it_is_not_known():
    alone = told(make_study())["energy_ratio"]
    assert "its error from run to run is not known" in alone.statement
    assert np.isnan(alone.low) and np.isnan(alone.high)
    found = told(with_repeats(make_study(), 0.1))["energy_ratio"]
    assert found.low < 0.95 * found.value and found.high > 1.05 * found.value


def test_the_energy_ratio_covers_the_true_ratio_in_95_percent():
    rng, hits, n = np.random.default_rng(12), 0, 300
    true = pd.Series(np.linspace(1, 4, 16), DESIGN.index)
    for k in range(n):
        noisy = true * np.exp(0.1 * rng.normal(size=16))
        study = make_study(16, train_energy_wh=noisy, train_energy_low_wh=noisy / 2, train_energy_high_wh=noisy * 2)
        truth = dataclasses.replace(study, results=study.results.assign(train_energy_wh=true))
        ratio = effects.energy_ratio(
            dataclasses.replace(study, repeats=with_repeats(truth, 0.1, k).repeats), "c16", "c01"
        )
        hits += ratio.low <= 4 <= ratio.high
    assert 0.91 <= hits / n <= 0.98


def test_front_membership_moves_with_the_energy_of_runs():
    energy = pd.Series({"a": 1.0, "b": 1.02})
    draws = pd.DataFrame({"a": [0.0] * 400, "b": [-0.5] * 400})
    assert statistics.pareto_shares(energy, draws).to_dict() == {"a": 1.0, "b": 0.0}
    assert 0.3 < statistics.pareto_shares(energy, draws, spread=0.1)["b"] < 0.6


def test_an_effect_that_lack_of_fit_rejects_says_so_and_must_stand_out():
    rng = np.random.default_rng(5)
    loss = driven(rng, (0, 0.1, 2.0, 0), 0.001, interaction=0.5)
    study = make_study(16, val_loss=loss)
    frame = with_repeats(study, 0.1).repeats
    frame["val_loss"] = study.losses[frame["config"]].to_numpy() + 0.001 * rng.normal(size=4)
    found = told(dataclasses.replace(study, repeats=frame))
    strong, weak = found["effect.val_loss.epochs.1->4"], found["effect.val_loss.rank.8->64"]
    for effect in (strong, weak):
        assert "Effects do not add up (lack of fit F = " in effect.statement
        assert "by Holm over 6 effects (error: runs repeated with other seeds, 4 degrees" in effect.statement
    assert strong.verdict == "supported" and "it stands out from the interactions" in strong.statement
    assert ("does not stand out" in weak.statement) == (weak.verdict == "not distinguishable")


def test_energy_effects_of_the_factor_that_sets_the_order_warn_of_drift():
    found = told(make_study())
    warned = [id for id, f in found.items() if "a drift of the machine would look like this effect" in f.statement]
    assert warned and all(id.startswith("effect.trainingenergy(estimated).target_modules") for id in warned)
    assert "Start times are missing; if the runs took the order of the list" in found[warned[0]].statement
    started = [f"2026-06-05T{10 + i}:00:00" for i in range(16)]
    known = told(make_study(16, train_started_at=started))[warned[0]].statement
    assert "Configurations ran in the order of target_modules" in known and "Start times" not in known


def test_no_bound_of_a_rank_correlation_lies_beyond_one():
    """The mirror image of a wide bootstrap would; a difference of two may go up to 2."""
    rng = np.random.default_rng(3)
    side = divergence.Side(pd.Series(np.arange(8.0)), pd.DataFrame(rng.normal(size=(200, 8))))
    relabelled = np.array([rng.permutation(8) for _ in range(16)])
    found = divergence.compared(divergence.tau_rows, ("a", "b"), {"a": side, "b": side}, relabelled).interval
    assert found is not None and found.high == 1.0 and found.low >= -1.0
