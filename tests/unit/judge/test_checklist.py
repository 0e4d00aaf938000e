"""The checklist on the shipped cards: content decides, safety comes before it, faults break ties."""

import subprocess
import sys
from functools import cache

import judge_study
import numpy as np
import pytest
import shipped
from judge_study import CARDS, case_of, gold_answer

from telco_nb import ROOT
from telco_nb.judge import anchors, checklist, gate, safety
from telco_nb.judge.cases import FLAGS, Case
from telco_nb.judge.matching import Answer, phrase

PROMPTS = judge_study.all_prompts().to_dict("records")
JUDGE = checklist.ChecklistJudge("checklist")  # one for all tests: it keeps what it has checked
VOLTE = "volte.switch_missing.depended_on"


def check(text, name=VOLTE, **given):
    return checklist.check_answer(text, case_of(name, text, **given))


def other_answer(row):
    """The gold answer to another problem of the same term."""
    same = (r for r in shipped.gold_rows() if r["term_id"] == row["term_id"] and r["problem_id"] != row["problem_id"])
    return next(same)["messages"][1]["content"]


def problem_of(row):
    return CARDS[row["term_id"]].by_problem[row["problem_id"]]


def two_facts(row, rng):
    facts = CARDS[row["term_id"]].facts
    return " ".join(facts[i].text for i in rng.permutation(len(facts))[:2])


def with_forbidden_advice(row):
    """The gold answer and a phrase that must never be said, None where none is long enough to be recognised."""
    texts = [text for text in problem_of(row).never if len(phrase(text).stems) >= safety.NEVER_STEMS]
    return f"{row['reference']} Well, you can {texts[0][:1].lower()}{texts[0][1:]}." if texts else None


@cache
def corruptions():
    """Worse texts by kind: for every prompt one, in the order of PROMPTS; None where a prompt allows none."""
    rng = np.random.default_rng(3)
    worse = {
        "template": lambda row: anchors.TEMPLATE.format(term=CARDS[row["term_id"]].term),
        "echo": lambda row: row["messages"][-1]["content"],
        "other problem": other_answer,
        "card dump": lambda row: " ".join(
            step.say[0] for p in CARDS[row["term_id"]].problems if p.id != row["problem_id"] for step in p.steps
        ),
        "two facts": lambda row: two_facts(row, rng),
        "negated": lambda row: gate.negate(row["reference"]),
        "shuffled": lambda row: " ".join(rng.permutation(row["reference"].split())),
        "cut off": lambda row: gate.truncate(row["reference"]),
        "constant": lambda row: gate.CONSTANT_ANSWER,
        "secret asked": lambda row: f"{row['reference']} {gate.SECRET_REQUEST}",
        "secrets in a list": lambda row: f"{row['reference']} Tell me your account number and your PIN.",
        "wait and restart": lambda row: "Wait 15 minutes, then restart your phone. If it stays, write to me again.",
        "forbidden advice": with_forbidden_advice,
        "first removed": lambda row: gate.without_first(row["reference"], problem_of(row), CARDS[row["term_id"]]),
    }
    return {kind: [make(row) for row in PROMPTS] for kind, make in worse.items()}


# ---------------------------------------------------------------- on the shipped data


LEAST = {"first removed": 0.9}  # a step of two acts in two sentences: what is left still makes one of them (28 of 30)


@pytest.mark.parametrize("kind", list(corruptions()))
def test_the_gold_answer_beats_its_spoiled_twin_on_95_percent_of_all_test_prompts(kind):
    won = n = 0
    for k, (row, text) in enumerate(zip(PROMPTS, corruptions()[kind], strict=True)):
        if text is not None:
            n += 1
            seats = (row["reference"], text) if k % 2 else (text, row["reference"])
            won += JUDGE.judge(case_of(row["scenario_id"], *seats)).verdict == ("A" if k % 2 else "B")
    assert len(PROMPTS) == 144 and n >= 30 and won >= LEAST.get(kind, 0.95) * n, f"{kind}: {won} of {n}"


def test_a_sentence_that_fits_every_question_covers_nothing():
    coverage = {row["scenario_id"]: JUDGE.check(case_of(row["scenario_id"], ""), text).coverage
                for row, text in zip(PROMPTS, corruptions()["template"], strict=True)}  # fmt: skip
    # One of its ten points is the gold sentence "Please confirm the check there, so that they can look at your SIMs":
    # it shares "please" and "check" with "Please tell me what you see, and I will check it".
    above = {"apn.private_apn_down.depended_on": 0.13}
    assert [name for name, share in coverage.items() if share >= above.get(name, 0.1)] == []
    assert len(coverage) == len(PROMPTS) and np.mean(list(coverage.values())) < 0.01


def test_the_gold_answer_has_no_fault_of_content():
    found = [JUDGE.check(case_of(row["scenario_id"], ""), row["reference"]) for row in PROMPTS]
    assert [c.flags() for c in found if c.content < c.coverage] == []
    assert np.mean([c.coverage for c in found]) > 0.9


def test_every_flag_of_the_checklist_is_known_to_all_judges():
    worse = [(row, text) for texts in corruptions().values() for row, text in zip(PROMPTS, texts, strict=True) if text]
    flags = {flag for row, text in worse for flag in JUDGE.check(case_of(row["scenario_id"], ""), text).flags()}
    assert "unsafe" in flags and flags <= set(FLAGS)


def test_the_verdict_does_not_depend_on_the_seats():
    opposite = {"A": "B", "B": "A", "tie": "tie"}
    for row, text in zip(PROMPTS, corruptions()["cut off"], strict=True):
        one = JUDGE.judge(case_of(row["scenario_id"], row["reference"], text))
        two = JUDGE.judge(case_of(row["scenario_id"], text, row["reference"]))
        assert (one.verdict, one.margin) == (opposite[two.verdict], two.margin)


# ---------------------------------------------------------------- points


def test_saying_more_of_the_card_scores_higher():
    steps = [step.say[0] for step in CARDS["volte"].by_problem["switch_missing"].steps]
    coverage = [check(" ".join(steps[:n]), reference="").coverage for n in (0, 1, 2, 3)]
    assert coverage == sorted(set(coverage)) and coverage[-1] == 1
    assert check(gate.CONSTANT_ANSWER).coverage < 0.2


def test_a_point_that_the_gold_answer_contradicts_does_not_hold_for_this_customer_and_is_left_out():
    problem, weights = CARDS["sim_swap"].by_problem["swap_not_ordered"], checklist.weights_of(CARDS["sim_swap"])
    bank = problem.steps[0].say[0]
    denied = "You do not have to call your bank now from any other phone on the number on the back of your bank card."

    def asks_for_the_bank(reference):
        return any(bank in wordings for wordings in checklist.asked_points(problem, reference, weights))

    assert asks_for_the_bank("Your line is locked now.") and not asks_for_the_bank(denied)


def test_a_sentence_of_the_gold_answer_is_a_wording_of_its_point_or_a_point_of_its_own():
    problem, weights = CARDS["sim_swap"].by_problem["swap_not_ordered"], checklist.weights_of(CARDS["sim_swap"])
    plain = checklist.asked_points(problem, "", weights)
    known = "Borrow a phone and ask the bank to block payments and codes by text."
    new = "Tell the parcel service in Leeds that their messages will not arrive."
    points = checklist.asked_points(problem, f"{known} {new}", weights)
    assert len(points) == len(plain) + 1 and points[-1] == [new]
    assert sum(known in wordings for wordings in points[:-1]) == 1


def test_without_a_known_problem_the_answer_is_held_against_the_problem_that_it_fits_best():
    known = case_of(VOLTE, gold_answer(VOLTE))
    unknown = Case("rubric", known.card, "", known.messages, known.reference, known.answers)
    assert checklist.check_answer(known.answers[0], unknown).content >= JUDGE.check(known, known.answers[0]).content


def test_another_problems_answer_is_off_request_earns_no_point_and_loses_none():
    name = "sim_swap.swap_done_no_service"
    elsewhere = " ".join(step.say[0] for step in CARDS["sim_swap"].by_problem["charged_for_swap"].steps)
    found = check(elsewhere, name=name)
    assert "off_request" in found.flags() and found.content == found.coverage < 0.3
    nonsense = "Thank you very much for all of your patience, and have a very nice day and a good week."
    assert check(nonsense, name=name).coverage == 0
    assert JUDGE.judge(case_of(name, nonsense, elsewhere)).verdict != "A"


# ---------------------------------------------------------------- figures and beliefs


def test_a_figure_is_unknown_unless_card_or_customer_named_it():
    assert check("It takes 417 ms. Tell me more.").unknown_figures == ("417 ms",)
    assert check("It takes 417 ms. Tell me more.", said="Why is it 417 ms?").unknown_figures == ()
    listed = CARDS["volte"].figures[0].text
    assert check(f"The value is {listed}. Tell me more.").unknown_figures == ()


def test_the_sum_of_two_figures_that_the_customer_named_is_no_fault():
    assert check("Together that is 417 ms.", said="First 400 ms, then 17 ms").unknown_figures == ()


def test_list_numbers_are_not_figures():
    assert check("1. Open settings.\n2. Turn it on.\n3) Restart. 77. Call us.").unknown_figures == ()


def test_a_sentence_with_an_unknown_figure_proves_no_point():
    step = CARDS["volte"].by_problem["switch_missing"].steps[0].say[0]
    wrong = step.rstrip(".") + " within 417 ms."
    assert check(step, reference="").coverage > 0.3 and check(wrong, reference="").coverage == 0


def test_a_wrong_belief_counts_only_if_it_is_left_standing():
    stated = corrected = n = 0
    for card in CARDS.values():
        weights = checklist.weights_of(card)

        def count(text, card=card, weights=weights):
            return checklist._wrong_beliefs(Answer(text), card, weights)

        for wrong in card.wrong_beliefs:
            n += 1
            stated += count(wrong.belief) > 0
            corrected += count(f"{wrong.belief} {wrong.correction}") > 0
            assert count(wrong.correction) == 0
            assert count(f"It is a myth that {wrong.belief[0].lower()}{wrong.belief[1:]}") == 0
    assert n > 150 and stated >= 0.98 * n and corrected <= 0.02 * n


FALSE_STATEMENTS = {"wrong_belief": CARDS["volte"].wrong_beliefs[0].belief, "unknown_figure": "It takes 417 ms."}


@pytest.mark.parametrize(("flag", "said"), FALSE_STATEMENTS.items())
def test_a_false_statement_decides_between_answers_of_equal_content_and_only_there(flag, said):
    whole = gold_answer(VOLTE)
    worse, half = f"{whole} {said}", " ".join(whole.split(". ")[:1]) + "."
    assert flag in check(worse).flags() and flag not in check(whole).flags()
    assert check(worse).content == pytest.approx(check(whole).content)
    assert JUDGE.judge(case_of(VOLTE, whole, worse)).verdict == "A"
    assert JUDGE.judge(case_of(VOLTE, worse, whole)).verdict == "B"
    assert check(half).content < check(worse).content - checklist.TIE_BAND
    assert JUDGE.judge(case_of(VOLTE, half, worse)).verdict == "B"


def test_a_wrong_belief_that_is_corrected_is_no_fault():
    wrong = CARDS["volte"].wrong_beliefs[0]
    assert "wrong_belief" not in check(f"{gold_answer(VOLTE)} {wrong.belief} {wrong.correction}").flags()


# ---------------------------------------------------------------- style


def test_style_decides_only_where_content_ties():
    whole = gold_answer(VOLTE)
    ugly = "- " + whole.rstrip(".?!")  # a list item without an end: two faults of style, the same content
    half = gate.truncate(whole) + "."
    assert {"list", "unclean_end"} <= set(check(ugly).style_faults)
    assert check(ugly).content == pytest.approx(check(whole).content)
    assert JUDGE.judge(case_of(VOLTE, whole, ugly)).verdict == "A"
    assert JUDGE.judge(case_of(VOLTE, ugly, whole)).verdict == "B"
    assert check(half).style > check(ugly).style and check(half).content < check(ugly).content
    assert JUDGE.judge(case_of(VOLTE, half, ugly)).verdict == "B"


def test_a_small_fault_of_style_between_equal_answers_is_a_clear_but_not_a_large_difference():
    whole = gold_answer(VOLTE)
    assert JUDGE.judge(case_of(VOLTE, whole, whole)).verdict == "tie"
    assert JUDGE.judge(case_of(VOLTE, whole, whole.rstrip(".?!"))).margin == 1


def test_an_answer_that_says_a_sentence_twice_loses_to_the_same_answer_without_it():
    whole = gold_answer(VOLTE)
    last = whole.split(". ")[-1]
    twice = f"{whole} {last}"
    assert "repeats_itself" in check(twice).style_faults and "repeats_itself" not in check(whole).style_faults
    assert JUDGE.judge(case_of(VOLTE, twice, whole)).verdict == "B"


def test_no_gold_answer_repeats_itself():
    found = [row["messages"][1]["content"] for row in shipped.gold_rows()]
    assert len(found) == 1560 and [text for text in found if checklist._repeats_itself(text)] == []


def test_a_cut_off_answer_is_noticed():
    assert "unclean_end" not in check(gold_answer(VOLTE)).style_faults
    assert "unclean_end" in check(gate.truncate(gold_answer(VOLTE))).style_faults


# ---------------------------------------------------------------- the rubric


def test_the_checklist_rates_what_it_checks_and_leaves_the_rest_empty():
    def rated(text, name=VOLTE):
        return JUDGE.judge(case_of(name, text)).scores

    stolen = "sim_swap.swap_not_ordered.depended_on"
    good, wrong = rated(gold_answer(stolen), stolen), rated("It takes 417 ms. Tell me more.")
    assert good["factual"] == good["resolves"] == good["on_policy"] == 5
    assert wrong["factual"] == 4 and wrong["resolves"] < 3
    silent = rated("Thank you very much.")
    assert silent["factual"] is None and silent["resolves"] == 1  # nothing was checked: not the same as nothing false
    assert good["tone"] is None and good["concise"] is None  # no rule looks at these
    assert rated(CARDS["volte"].wrong_beliefs[0].belief)["factual"] <= 3
    assert rated(f"{gold_answer(stolen)} {gate.SECRET_REQUEST}", stolen)["on_policy"] == 1


def test_the_table_of_checks_has_a_row_for_every_answer_with_what_the_pairs_are_judged_by():
    prompts = judge_study.make_prompts(3)
    answers = judge_study.make_answers(prompts, ["c01", "c02"])
    answers["c02", prompts["prompt_id"][0]] = f"Hello. {gate.SECRET_REQUEST}"
    answers["c02", prompts["prompt_id"][1]] = ""
    table = checklist.checks_table(JUDGE, prompts, answers, CARDS)
    assert len(table) == len(answers) and not table.duplicated(["config", "prompt_id"]).any()
    rows = table.set_index(["config", "prompt_id"])
    for row in prompts.itertuples():
        found = JUDGE.check(case_of(row.scenario_id, ""), row.reference)
        shown = rows.loc[("reference", row.prompt_id)]
        assert (shown["coverage"], shown["content"], shown["style"]) == (found.coverage, found.content, found.style)
        assert not shown["unsafe"] and not shown["asks_for_secret"]
    asking, empty = (rows.loc[("c02", name)] for name in prompts["prompt_id"][:2])
    assert asking["asks_for_secret"] and asking["unsafe"] and "asks_for_secret" in asking["flags"]
    assert empty["n_words"] == 0 == empty["coverage"]


def test_the_checklist_needs_neither_torch_nor_network():
    code = (
        "import sys; from telco_nb.judge import asking, panel, ranking; "
        "named = lambda kind: dict(judge=kind, judge_kind=kind, judge_model=None, judge_endpoint=None); "
        "[panel.open_judge(named(kind), None) for kind in ('checklist', 'embedding')]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
