"""Votes correct a judge's scores: a biased judge moves none, intervals hold the truth, few votes correct nothing."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from telco_nb import ROOT
from telco_nb.analysis import correction
from telco_nb.analysis.results import JudgeResults
from telco_nb.judge import bradley_terry

sys.path.append(str(ROOT / "bench"))
import judging_correction as simulation

CONFIGS = simulation.CONFIGS
PAIRS = simulation.plan(160, simulation.ABILITIES, seed=0)


def made(bias="none", seed=1, n_terms=52, per_term=4, pairs=PAIRS):
    return simulation.study(pairs, simulation.BIASES[bias], n_terms, per_term, seed)


def corrected(voted, judged):
    found = correction.correct_scores("checklist", "ann", voted, judged, CONFIGS)
    assert found is not None
    return found


@pytest.mark.parametrize("bias", ["prefers some configurations", "upside down, never a tie"])
def test_intervals_hold_the_truth_although_the_judge_is_biased(bias):
    """A smaller version of bench/judging_correction.py: 30 studies of 200, two biases of six."""
    found = simulation.coverage(simulation.BIASES[bias], studies=30)
    assert 0.92 <= found["corrected"] <= 0.99 and found["studies"] == 30
    assert found["error"] < found["judge's error"] and found["width"] < 1.02


def test_by_votes_alone_it_is_a_logistic_fit_of_wins():
    voted, judged = made()
    decided = voted[voted["winner"] != "tie"]
    x = correction._Data.of(*correction._joined(decided, judged, CONFIGS), CONFIGS).x
    ours = correction.solve(x, (decided["verdict"] == "A").to_numpy(float))
    theirs = bradley_terry.fit_bradley_terry(decided, CONFIGS, ties=False, position=True, ridge=bradley_terry.RIDGE)
    np.testing.assert_allclose(ours[:-1], theirs.abilities, atol=1e-6)
    assert ours[-1] == pytest.approx(theirs.position, abs=1e-6)


def test_a_judge_that_sees_what_voters_see_narrows_the_intervals_and_one_that_guesses_gets_no_weight():
    voted, judged = made("none")
    guessing = corrected(voted, judged.assign(winner=np.random.default_rng(0).permutation(judged["winner"])))
    assert guessing.weight < 0.15

    def pairs(table):
        low, high = (getattr(table[["config_first", "config_second"]], end)(axis=1) for end in ("min", "max"))
        return pd.MultiIndex.from_arrays([table["prompt_id"], low, high])

    known = pd.Series(voted["winner"].to_numpy(), index=pairs(voted))
    told = known[~known.index.duplicated()].reindex(pairs(judged)).to_numpy()
    agreeing = corrected(voted, judged.assign(winner=pd.Series(told).fillna(judged["winner"])))
    table = agreeing.table
    width = (table["high"] - table["low"]) / (table["votes_high"] - table["votes_low"])
    assert agreeing.weight > 0.8 and width.median() < 0.6


def test_seats_and_the_order_of_names_change_nothing():
    voted, judged = made("prefers some configurations")
    turned = judged.rename(columns={"config_first": "config_second", "config_second": "config_first"})
    pd.testing.assert_frame_equal(corrected(voted, judged).table, corrected(voted, turned).table)
    back = {c: CONFIGS[-1 - i] for i, c in enumerate(CONFIGS)}
    names = ["config_first", "config_second", "winner"]
    other = [table.assign(**{n: table[n].replace(back) for n in names}) for table in (voted, judged)]
    one = corrected(voted, judged).table.set_index("config")
    two = corrected(*other).table.set_index("config").rename(index={v: k for k, v in back.items()})
    pd.testing.assert_frame_equal(one, two.loc[one.index], atol=1e-6)


def test_errors_are_clustered_by_term():
    voted, judged = made()
    copies = pd.concat([voted] * 4)  # the same votes four times are no more than once
    once, four = corrected(voted, judged), corrected(copies, judged)
    width = [(c.table["votes_high"] - c.table["votes_low"]).median() for c in (once, four)]
    assert width[1] == pytest.approx(width[0], rel=0.12)


def test_few_votes_few_terms_or_unconnected_configurations_correct_nothing():
    voted, judged = made()
    assert correction.correct_scores("j", "v", voted.head(99), judged, CONFIGS) is None
    assert correction.correct_scores("j", "v", voted.assign(source="rule"), judged, CONFIGS) is None
    assert correction.correct_scores("j", "v", *made(n_terms=7, per_term=30), CONFIGS) is None
    apart = voted[(voted["config_first"] != "c01") & (voted["config_second"] != "c01")]
    assert correction.correct_scores("j", "v", pd.concat([apart, apart]), judged, CONFIGS) is None
    assert correction.correct_scores("j", "v", voted, judged.assign(prompt_id=-1), CONFIGS) is None


def test_a_score_that_the_votes_do_not_limit_has_no_bound():
    voted, judged = made()
    first, second = voted["config_first"] == "c16", voted["config_second"] == "c16"
    won = voted.assign(winner=voted["winner"].mask(first | second, "c16"))
    won["verdict"] = won["verdict"].mask(first, "A").mask(second, "B")
    row = corrected(won, judged).table.set_index("config").loc["c16"]
    assert np.isnan(row["high"]) and np.isnan(row["votes_high"])


def judge(name, kind, passed=True):
    return JudgeResults(name, kind, passed, 1.0, (), pd.DataFrame(), pd.DataFrame())


def shown_by_06(panel, judgements):
    """The table that the cell of 06_analysis writes; None if it writes none."""
    cells = json.loads((ROOT / "notebooks" / "06_analysis.ipynb").read_text())["cells"]
    source = next("".join(cell["source"]) for cell in cells if "corrections(panel" in "".join(cell["source"]))
    names = {"panel": panel, "judgements": judgements, "configs": CONFIGS, "pd": pd, "markdown": str, "display": str}
    names |= {"corrections": correction.corrections, "correction_text": correction.correction_text, "readable": str}
    kept: list = []
    exec(source, names | {"run": SimpleNamespace(table=lambda name, table: kept.append(table))})
    return kept[0] if kept else None


def test_people_correct_together_a_panel_by_itself_and_only_who_passed_the_gate():
    voted, judged = made()
    panel = [judge("checklist", "checklist"), judge("human-ann", "human"), judge("human-ben", "human"),
             judge("panel", "language_model_panel"), judge("human-cat", "human", passed=False)]  # fmt: skip
    tables = {"checklist": judged, "human-ann": voted.head(80), "human-ben": voted.tail(80), "panel": voted}
    found = correction.corrections(panel, tables | {"human-cat": voted}, CONFIGS)
    assert [(c.voters, c.n_votes) for c in found] == [("human-ann and human-ben", 160), ("panel", 160)]
    assert shown_by_06(panel, tables | {"human-cat": voted})["voters"].nunique() == 2
    assert shown_by_06(panel[:1], tables) is None
    text = correction.correction_text(found[0])
    assert "160 votes of human-ann and human-ben on 52 terms correct checklist" in text and "nan" not in text
    assert correction.corrections(panel[:1], tables, CONFIGS) == []
