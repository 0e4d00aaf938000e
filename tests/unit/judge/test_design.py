"""The design of the comparisons: balanced and reproducible, sparse where it costs, complete where it costs nothing."""

from collections import Counter

import judge_study
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_study import SHARES, StubJudge, bare_prompts, first_seat

from telco_nb.judge import checklist, design, protocol
from telco_nb.judge.anchors import ANCHORS
from telco_nb.judge.store import VerdictStore

CONFIGS = [f"c{i:02d}" for i in range(1, 17)]


@given(st.integers(2, 17))
def test_matchings_hold_every_pair_once_with_a_bye_when_odd(n):
    rounds = design.matchings(n)
    pairs = Counter(pair for pairs in rounds for pair in pairs)
    assert pairs == {(i, j): 1 for i in range(n) for j in range(i + 1, n)}
    for pairs in rounds:
        seated = [i for pair in pairs for i in pair]
        assert len(seated) == len(set(seated)) == n - n % 2


def test_sixteen_configurations_on_156_prompts_cost_the_calls_of_the_protocol():
    plan = design.plan_comparisons(bare_prompts(156), CONFIGS, **SHARES)
    counts = plan["purpose"].value_counts()
    assert counts["ranking"] + counts["swap"] == 3120
    assert counts["retest"] == round(0.05 * 2496)
    anchored = plan[plan["purpose"] == "anchor"]
    assert anchored["prompt_id"].nunique() == round(0.2 * 156)
    assert set(anchored["config_first"]) | set(anchored["config_second"]) >= set(ANCHORS)


@given(n=st.integers(2, 12), n_prompts=st.integers(1, 40), m=st.integers(1, 4), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_any_number_of_configurations_gets_balanced_pairs_and_seats(n, n_prompts, m, seed):
    configs = [f"k{i}" for i in range(n)]
    plan = design.plan_comparisons(
        bare_prompts(n_prompts), configs, **(SHARES | {"matchings_per_prompt": m, "seed": seed})
    )
    base = plan[plan["purpose"] == "ranking"]
    pairs = Counter(tuple(sorted(p)) for p in zip(base["config_first"], base["config_second"], strict=True))
    met = [pairs[tuple(sorted((a, b)))] for i, a in enumerate(configs) for b in configs[:i]]
    assert max(met) - min(met) <= 1
    seats = Counter(zip(base["config_first"], base["config_second"], strict=True))
    assert all(abs(seats[a, b] - seats[b, a]) <= 1 for a in configs for b in configs)
    once = base.assign(pair=[tuple(sorted(p)) for p in base[["config_first", "config_second"]].to_numpy()])
    assert not once.duplicated(["prompt_id", "pair"]).any()


def test_the_plan_is_a_pure_function_of_prompts_configurations_and_parameters():
    prompts = bare_prompts(20)
    plan = design.plan_comparisons(prompts, CONFIGS, **SHARES)
    shuffled = design.plan_comparisons(prompts.sample(frac=1, random_state=3), CONFIGS, **SHARES)
    pd.testing.assert_frame_equal(plan, shuffled)
    other = design.plan_comparisons(prompts, CONFIGS, **(SHARES | {"seed": 2}))
    assert not plan.equals(other)


def test_swapped_questions_exchange_the_seats_and_retests_repeat_them():
    plan = design.plan_comparisons(bare_prompts(20), CONFIGS, **SHARES)
    base = {tuple(r) for r in plan[plan["purpose"] == "ranking"][["prompt_id", "config_first", "config_second"]].values}
    swap, retest = (plan[plan["purpose"] == p] for p in ("swap", "retest"))
    assert {(r.prompt_id, r.config_second, r.config_first) for r in swap.itertuples()} <= base
    assert {(r.prompt_id, r.config_first, r.config_second) for r in retest.itertuples()} <= base
    assert set(swap["order"]) == {"ba"} and set(retest["repeat"]) == {1}


@pytest.mark.parametrize("configs", [["c01"], ["c01", "c01"], ["c01", "untuned"]])
def test_designs_that_cannot_be_ranked_are_refused(configs):
    with pytest.raises(ValueError, match="at least two"):
        design.plan_comparisons(bare_prompts(3), configs, **SHARES)


# ---------------------------------------------------------------- what costs nothing is asked in full


def met(plan: pd.DataFrame, purpose: str) -> Counter:
    """How often two met on a prompt, whatever their seats."""
    rows = plan[plan["purpose"] == purpose]
    return Counter((r.prompt_id, *sorted((r.config_first, r.config_second))) for r in rows.itertuples())


@pytest.mark.parametrize("n", [2, 3, 4, 16])
def test_a_complete_plan_holds_every_pair_once_on_every_prompt_and_every_anchor_against_every_configuration(n):
    prompts, configs = bare_prompts(7), CONFIGS[:n]
    plan = design.plan_comparisons(prompts, configs, **SHARES, complete=True)
    everywhere = [(p, a, b) for p in prompts["prompt_id"] for i, a in enumerate(configs) for b in configs[i + 1 :]]
    assert met(plan, "ranking") == Counter(everywhere)
    anchored = [(p, *sorted((a, c))) for p in prompts["prompt_id"] for a in ANCHORS for c in configs]
    assert met(plan, "anchor") == Counter(anchored)
    ranking = plan[plan["purpose"] == "ranking"]
    seats = Counter(zip(ranking["config_first"], ranking["config_second"], strict=True))
    assert all(abs(seats[a, b] - seats[b, a]) <= 1 for a in configs for b in configs)


def test_the_complete_plan_of_the_study_has_the_questions_that_its_size_says():
    plan = design.plan_comparisons(bare_prompts(408), CONFIGS, **SHARES, complete=True)
    counts = plan["purpose"].value_counts()
    assert counts["ranking"] == 408 * 16 * 15 / 2 and counts["anchor"] == 408 * 5 * 16


def test_anchors_without_answers_are_left_out_and_no_anchor_is_asked_with_a_share_of_0():
    given = {"complete": True, "anchors": ["reference", "echo"]}
    plan = design.plan_comparisons(bare_prompts(5), CONFIGS, **SHARES, **given)
    anchored = plan[plan["purpose"] == "anchor"]
    seated = set(anchored["config_first"]) | set(anchored["config_second"])
    assert seated - set(CONFIGS) == {"reference", "echo"} and len(anchored) == 5 * 2 * 16
    none = design.plan_comparisons(bare_prompts(5), CONFIGS, **(SHARES | {"anchor_share": 0.0}), **given)
    assert "anchor" not in set(none["purpose"])


@pytest.mark.parametrize("free", [True, False])
def test_a_free_judge_gets_the_complete_plan_and_a_paid_one_the_sparse_plan(free, tmp_path):
    prompts, configs = judge_study.make_prompts(6), CONFIGS[:5]
    answers = judge_study.make_answers(prompts, configs)
    known = {key: text for key, text in answers.items() if key[0] != "nearest"}
    judge = checklist.ChecklistJudge("checklist") if free else StubJudge(first_seat)
    values = {"configs": configs, "rubric_share": 0.0, "judge_after_failed_gate": False, **SHARES}
    store = VerdictStore(tmp_path / "v.jsonl")
    plan = protocol.build_protocol(judge, store, values, prompts, known, judge_study.CARDS).plans["pairs"]
    counts = plan["purpose"].value_counts()
    assert counts["ranking"] == (6 * 10 if free else 6 * 2 * 2)  # all pairs, or two rounds of a pair each
    assert counts["anchor"] == (6 * 4 * 5 if free else 1 * 4 * design.ANCHOR_OPPONENTS)
    assert "nearest" not in set(plan["config_first"]) | set(plan["config_second"])


# ---------------------------------------------------------------- the rubric


def test_a_smaller_share_of_ratings_is_a_part_of_a_larger_one():
    small, large = (design.plan_ratings(bare_prompts(40), CONFIGS, share=s, seed=3) for s in (0.25, 0.5))
    assert len(small) == 10 * 16 and set(small["prompt_id"]) < set(large["prompt_id"])
    assert design.plan_ratings(bare_prompts(40), CONFIGS, share=0.0, seed=3).empty
