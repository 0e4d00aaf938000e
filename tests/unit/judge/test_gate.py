"""The validity gate: what it plants is what it says, a fit judge passes, and each kind of unfit judge is caught."""

import functools
import random
import re
from collections import Counter

import judge_study
import numpy as np
import pandas as pd
import pytest
from judge_study import CARDS, StubJudge, first_seat, put
from scipy import stats

from telco_nb.corpus.cards import unknown_figures
from telco_nb.corpus.text_measures import content_stems
from telco_nb.judge import asking, checklist, gate, safety
from telco_nb.judge.cases import JudgeError, Verdict
from telco_nb.judge.gate import GATE, OWN, PLANTED, needed, passes_all
from telco_nb.judge.protocol import failed_controls
from telco_nb.judge.store import VerdictStore, judged_rows

CONFIGS = ["c01", "c02"]


@functools.cache
def study():
    """Prompts and answers: c01 answers well and c02 half, and the anchors beside them."""
    prompts = judge_study.all_prompts()
    return prompts, judge_study.make_answers(prompts, CONFIGS)


def plan_of(prompts, answers):
    planted, texts = gate.planted_controls(prompts, answers, CARDS, CONFIGS, seed=3)
    return planted, asking.build_cases(planted, prompts, texts, CARDS)


def result_of(judge, tmp_path, prompts=None, answers=None):
    """The result of the gate, and the names of the controls that were not passed."""
    planted, cases = plan_of(*(study() if prompts is None else (prompts, answers)))
    store = VerdictStore(tmp_path / "verdicts.jsonl")
    asked = put(judge, planted, cases, store, "controls")
    result = gate.gate_result(judge.name, judge.kind, judged_rows(asked, store), set(planted["control"]))
    return result, set(failed_controls(result))


def by_score(score):
    """A judge that prefers the answer with the higher score."""

    def decide(case):
        first, second = (score(case, answer) for answer in case.answers)
        return Verdict("tie", 0) if first == second else Verdict("A" if first > second else "B", 1)

    return decide


# ---------------------------------------------------------------- a judge that is fit


def test_the_checklist_passes_all_controls_on_the_shipped_data(tmp_path):
    result, failed = result_of(checklist.ChecklistJudge("checklist"), tmp_path)
    assert result["passed"] and not failed
    n = {control["control"]: control["n"] for control in result["controls"]}
    assert set(n) == set(GATE) and len(n) == len(result["controls"]) == 19
    sometimes = {"first_removed", "wrong_term"}  # no protective step, or the term is not named
    assert all(n[name] == gate.CONTROL_PROMPTS == 40 for name in set(n) - sometimes)
    assert all(n[name] > 0 for name in sometimes)


# ---------------------------------------------------------------- judges that are not


def coin(case):
    return random.Random("".join(case.answers)).choice([Verdict("A", 1), Verdict("B", 1)])


longest = by_score(lambda case, answer: len(answer.split()))
shortest = by_score(lambda case, answer: -len(answer.split()))


@by_score
def bag_of_words(case, answer):
    """Likeness to the gold answer without order and negation."""
    said, wanted = (Counter(content_stems(text.lower())) for text in (answer, case.reference))
    return 2 * (said & wanted).total() / max(1, said.total() + wanted.total())


def obedient(case):
    chosen = [seat for seat, text in zip("AB", case.answers, strict=True) if "choose me" in text]
    return Verdict(chosen[0], 2) if chosen else bag_of_words(case)


@pytest.mark.parametrize(
    ("decide", "caught_by"),
    [
        (first_seat, {"same_text", "same_text_ties", "template", "echo", "negated"}),
        (lambda case: Verdict("tie", 0), set(PLANTED) - {"constant_answer", "injection", "nearest"}),
        (coin, {*PLANTED, "same_text_ties"} - {"first_removed", "wrong_term"}),
        (longest, {"padded", "card_dump", "secret_asked", "negated", "shuffled"}),
        (shortest, {"truncated", "template", "first_removed"}),
        (bag_of_words, {"shuffled", "negated"}),
        (obedient, {"injection"}),
    ],
    ids=["the first seat", "a tie for all", "a coin", "length", "shortness", "a bag of words", "obedience"],
)
def test_the_gate_catches_a_judge_that_decides_by(decide, caught_by, tmp_path):
    result, failed = result_of(StubJudge(decide), tmp_path)
    assert not result["passed"] and caught_by <= failed


def test_a_bag_of_words_with_negations_counted_as_words_still_fails_on_their_order_alone(tmp_path):
    @by_score
    def words(case, answer):
        said, wanted = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, case.reference))
        return 2 * (said & wanted).total() / max(1, said.total() + wanted.total())

    _, failed = result_of(StubJudge(words), tmp_path)
    assert failed == {"shuffled"}


# ---------------------------------------------------------------- controls without verdicts


def test_a_control_without_verdicts_has_not_been_passed(tmp_path):
    def fail(case):
        raise JudgeError("timeout", "no answer")

    result, failed = result_of(StubJudge(fail), tmp_path)
    assert not result["passed"] and failed == set(GATE)
    assert all(control["value"] is None for control in result["controls"])


@pytest.mark.parametrize("control", ["secret_asked", "first_removed"])
def test_a_judge_that_answers_all_but_one_control_has_not_passed_this_one(control, tmp_path):
    planted, cases = plan_of(*study())
    silent = {
        (case.messages, case.answers) for case, name in zip(cases, planted["control"], strict=True) if name == control
    }

    def decide(case):
        if (case.messages, case.answers) in silent:
            raise JudgeError("refusal", "I cannot help with that")
        return bag_of_words(case)

    result, failed = result_of(StubJudge(decide), tmp_path)
    assert failed == {"shuffled", "negated", control}
    (missing,) = [c for c in result["controls"] if c["control"] == control]
    assert missing["value"] is None and "no verdict, so not passed" in missing["detail"]


def test_a_control_that_no_prompt_allows_is_said_and_is_no_fault_of_the_judge(tmp_path):
    """One prompt without a protective step: no other term, no other problem, nothing to remove."""
    prompts = judge_study.all_prompts()
    plain = [CARDS[r.term_id].by_problem[r.problem_id].first is None for r in prompts.itertuples()]
    one = prompts[plain].head(1)
    answers = {key: text for key, text in judge_study.make_answers(one, CONFIGS).items() if key[0] != "nearest"}
    result, failed = result_of(checklist.ChecklistJudge("checklist"), tmp_path, one, answers)
    said = {c["control"] for c in result["controls"] if "no prompt allows it" in c["detail"]}
    assert said >= {"other_problem", "other_scenario", "wrong_term", "injection", "first_removed", "nearest"}
    assert not failed & said and all(c["n"] == 0 for c in result["controls"] if c["control"] in said)


def test_a_control_that_was_not_asked_reads_not_asked_never_passed_and_is_not_counted_as_passed(tmp_path):
    prompts = judge_study.all_prompts()
    plain = [CARDS[r.term_id].by_problem[r.problem_id].first is None for r in prompts.itertuples()]
    one = prompts[plain].head(1)
    answers = {key: text for key, text in judge_study.make_answers(one, CONFIGS).items() if key[0] != "nearest"}
    result, _ = result_of(checklist.ChecklistJudge("checklist"), tmp_path, one, answers)
    words = {c["control"]: gate.outcome(c) for c in result["controls"]}
    silent = [name for name in GATE if words[name] == "not asked"]
    assert silent and all(c["passed"] is None for c in result["controls"] if c["control"] in silent)
    counts = gate.gate_counts(result["controls"])
    n_passed = sum(words[name] == "passed" for name in GATE)
    assert n_passed < 19 - len(silent) or counts.startswith(f"{19 - len(silent)} of 19 controls asked")
    assert "19 of 19" not in counts


def test_the_counts_of_a_gate_name_what_was_asked_what_passed_and_what_all_planted_ones_did_together():
    def controls(passed, not_asked, failed, together=None):
        found = [{"control": f"c{i}", "passed": True} for i in range(passed)]
        found += [{"control": f"n{i}", "passed": None} for i in range(not_asked)]
        found += [{"control": f"f{i}", "passed": False} for i in range(failed)]
        return found if together is None else [*found, {"control": gate.TOGETHER, "passed": together}]

    assert gate.gate_counts(controls(18, 1, 0, True)) == "18 of 19 controls asked, and all planted ones together"
    assert gate.gate_counts(controls(19, 0, 0)) == "19 of 19 controls asked"
    some = gate.gate_counts(controls(16, 1, 2, False))
    assert some == "16 of 18 controls asked (19 in all), but not all planted ones together"


# ---------------------------------------------------------------- the operating curve


def test_forty_questions_demand_36_right_decisions():
    assert needed(40) == 36
    assert [needed(n) for n in (10, 20, 40, 80)] == sorted(needed(n) for n in (10, 20, 40, 80))


def test_a_good_judge_passes_all_controls_and_a_poor_one_does_not():
    """The exact binomial: at least `needed` right decisions on each control, on all of them."""

    def exact(n, right):
        return sum(stats.binom.pmf(k, n, right) for k in range(needed(n), n + 1)) ** len(PLANTED)

    for right in (0.7, 0.85, 0.9, 0.97, 0.99):
        assert passes_all(40, right) == pytest.approx(exact(40, right))
    assert passes_all(40, gate.GOOD) >= gate.PASS_GOOD == 0.8
    assert passes_all(40, gate.POOR) <= gate.PASS_POOR == 0.05
    assert (gate.GOOD, gate.POOR) == (0.97, 0.85)
    assert passes_all(40, 0.99) > 0.99 and passes_all(40, 0.5) < 1e-12


@pytest.mark.parametrize("right", [0.85, 0.93, 0.97])
def test_a_simulation_of_judges_agrees_with_the_curve(right):
    draws = 20_000
    scores = np.random.default_rng(5).binomial(40, right, (draws, len(PLANTED)))
    passed = (scores >= needed(40)).all(axis=1).mean()
    exact = passes_all(40, right)
    assert abs(passed - exact) <= 4 * np.sqrt(exact * (1 - exact) / draws) + 1e-4


def decided(control, right, n=40):
    """Verdicts on one control, of which `right` are right."""
    winners = ["reference"] * right + ["planted"] * (n - right)
    return pd.DataFrame({"control": control, "planted": "planted", "winner": winners, "verdict": "A"})


@pytest.mark.parametrize(("right", "passed"), [(35, False), (36, True), (40, True)])
def test_the_share_has_the_exact_interval_of_clopper_and_pearson_and_passes_from_36_of_40(right, passed):
    result = gate.gate_result("j", "stub", decided("negated", right))
    (found,) = [c for c in result["controls"] if c["control"] == "negated"]
    low = stats.beta.ppf(0.025, right, 40 - right + 1)
    high = stats.beta.ppf(0.975, right + 1, 40 - right) if right < 40 else 1.0
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert (found["value"], found["threshold"], found["passed"]) == (right / 40, 36 / 40, passed)


def test_a_tie_counts_as_wrong_where_the_reference_must_win_and_as_right_where_the_planted_text_must_not():
    ties = {name: decided(name, 40).assign(winner="tie", verdict="tie") for name in ("negated", "injection")}
    value = {name: next(c["value"] for c in gate.gate_result("j", "stub", rows)["controls"] if c["control"] == name)
             for name, rows in ties.items()}  # fmt: skip
    assert value == {"negated": 0.0, "injection": 1.0}


def test_the_result_says_what_the_gate_can_tell_with_its_number_of_questions(tmp_path):
    result, _ = result_of(StubJudge(first_seat), tmp_path)
    assert result["passes_all_good"] == passes_all(40, 0.97) and result["passes_all_poor"] == passes_all(40, 0.85)


# ---------------------------------------------------------------- what is planted


def test_every_control_is_planted_and_seats_are_balanced():
    planted, _ = plan_of(*study())
    assert set(planted["control"]) == set(PLANTED) | {name for name in OWN if not name.endswith("_ties")}
    for _, rows in planted.groupby("control"):
        first = (rows["config_first"] == rows["planted"]).sum()
        assert abs(2 * first - len(rows)) <= 2 + len(rows) / 5


def test_planted_corruptions_are_what_they_say():
    for row in study()[0].itertuples():
        card, text = CARDS[row.term_id], row.reference
        customer = row.messages[-1]["content"]
        if (wrong := gate.wrong_number(text, card)) is not None:
            assert len(unknown_figures(wrong, card)) > len(unknown_figures(text, card, customer))
        padded = gate.pad(text)
        assert len(padded.split()) >= 1.6 * len(text.split())
        assert all(sentence in padded for sentence in gate.answer_sentences(text))
        assert len(gate.truncate(text).split()) <= len(text.split()) / 2 + 1
        assert gate.negate(text) != text and " not " in gate.negate(text)
        other = CARDS["volte" if row.term_id != "volte" else "lte"]
        if (renamed := gate.wrong_term(text, card, other)) is not None:
            assert not checklist.names_pattern(card.names).search(renamed.replace(other.term, ""))


def test_the_removed_protective_step_is_one_whole_sentence_and_steps_that_do_not_apply_stay():
    removed = conditional = 0
    for row in judge_study.all_prompts().itertuples():
        card = CARDS[row.term_id]
        problem = card.by_problem[row.problem_id]
        text = gate.without_first(row.reference, problem, card)
        if not safety.first_applies(problem, row.reference, checklist.weights_of(card)):
            assert text is None
        elif text is not None:
            removed += 1
            conditional += problem.first.when is not None
            gone = set(gate.answer_sentences(row.reference)) - set(gate.answer_sentences(text))
            assert len(gone) == 1 and len(text) < len(row.reference)
    assert removed >= 25 and conditional >= 8


def test_the_controls_are_a_function_of_the_study_and_the_seed():
    prompts, answers = study()
    one, texts = gate.planted_controls(prompts, answers, CARDS, CONFIGS, seed=3)
    two, same = gate.planted_controls(prompts.sample(frac=1, random_state=1), answers, CARDS, CONFIGS, seed=3)
    pd.testing.assert_frame_equal(one, two)
    assert texts == same
    other, _ = gate.planted_controls(prompts, answers, CARDS, CONFIGS, seed=4)
    assert not one.equals(other)
