"""Gold conversations: form, plan and variety of every term that is written, and what a second reading said."""

import itertools
import re

import gold
import pytest

from telco_nb.corpus.gold import POINTS, read_lines

TERMS = gold.terms()


@pytest.mark.parametrize("term", TERMS)
def test_a_card_has_ten_problems_and_its_conversations_follow_the_plan(term):
    assert gold.card(term).id == term
    assert gold.faults(term) == []


@pytest.mark.parametrize("term", TERMS)
def test_an_agent_says_only_figures_of_the_card_or_the_customer(term):
    assert gold.unknown_figures(term) == []


def test_no_two_answers_of_different_terms_are_alike():
    texts = {row["id"]: " ".join(gold.agent_texts(row)) for term in TERMS for row in gold.conversations(term)}
    sets = {key: gold.shingles(text) for key, text in texts.items()}
    alike = [
        (a, b)
        for (a, one), (b, two) in itertools.combinations(sets.items(), 2)
        if a.split(".")[0] != b.split(".")[0] and len(one & two) > 0.15 * len(one | two)
    ]
    assert alike == []


def test_fraud_and_safety_have_a_protective_step_or_say_in_their_steps_who_acts_first():
    for term in TERMS:
        for problem in gold.card(term).problems:
            if problem.kind in ("fraud", "safety"):
                assert problem.first or problem.steps[0].who == "agent" or problem.ask, f"{term}.{problem.id}"


@pytest.mark.parametrize("term", TERMS)
def test_a_second_reading_scores_every_conversation_and_none_stays_under_4(term):
    found = gold.reviews(term)
    assert [review["id"] for review in found] == [row["id"] for row in gold.conversations(term)]
    low = [r["id"] for r in found if min(r[point] for point in POINTS) < 4]
    assert low == []


def test_a_second_reading_scores_every_noisy_exchange_and_none_stays_under_4():
    noisy, scores = (
        [value for _, value in read_lines(gold.DATA / name)] for name in ("noisy.jsonl", "noisy_review.jsonl")
    )
    assert [row["id"] for row in noisy] == [row["id"] for row in scores] and len(noisy) == 144
    assert min(row[point] for row in scores for point in POINTS) >= 4


def test_a_copied_answer_is_found():
    one = "Please switch the phone off and on once, and then tell me what the screen shows."
    assert gold.alike(one, one) == 1.0
    assert gold.alike(one, "The bill lists a charge that was not ordered by you in June.") == 0.0


DEPENDED_ON = re.compile(
    r"\b(?:care|falls?|pendant|nurse|lift|telecare|medical|emergency|panic)[ -]"
    r"(?:alarm|call button|button|phone|pendant)\b|\bpendant\b|\btelecare\b|\balarm (?:button|cord|centre)\b",
    re.IGNORECASE,
)
SAFE_NOW = re.compile(  # somebody is to do something; to name the device again is not enough
    r"charged (?:mobile|phone)|\b(?:999|112|911)\b|emergency number|out of use|\btest(?:ed)?\b|\bpress|alarm centre"
    r"|the centre|with (?:him|her|them) until|somebody(?:'s| is)? (?:with|to)|priority|protected|plugged|look in\b"
    r"|hold on new|stop on any|backup|neighbour|nobody is in|lift (?:firm|company)",
    re.IGNORECASE,
)


def speaks_of_help(messages: list[dict[str, str]]) -> bool | None:
    """Whether the first answer speaks of a way to call for help; None where no such device is named before it."""
    asked, answer = messages[0]["content"], messages[1]["content"]
    return bool(SAFE_NOW.search(answer)) if DEPENDED_ON.search(asked) else None


def test_where_an_alarm_or_a_lift_phone_is_named_the_first_answer_speaks_of_calling_for_help():
    found = {row["id"]: speaks_of_help(row["messages"]) for term in TERMS for row in gold.conversations(term)}
    named = {key: value for key, value in found.items() if value is not None}
    assert len(named) >= 30
    assert [key for key, value in named.items() if not value] == []
    asked = {"role": "user", "content": "Mum's care alarm is dead."}
    for said in ("Please restart the router.", "Her alarm is no product of ours. Hold on."):
        assert speaks_of_help([asked, {"role": "assistant", "content": said}]) is False
