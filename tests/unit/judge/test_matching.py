"""Does an answer make a point? Words count in their order, by how telling they are, and not where they are negated."""

import judge_study
import numpy as np
import pytest
import shipped

from telco_nb.judge import checklist
from telco_nb.judge.matching import NEGATIONS, REACH, Answer, Weights, answer_sentences, match, phrase

CARD = judge_study.CARDS["sim_swap"]
WEIGHTS = Weights(CARD)
LOCKED = "I have locked your number, so the other SIM can no longer call or text."


def credit(point: str, text: str) -> float:
    """The credit of a text for a point; a contradiction counts as none."""
    found = match([point], Answer(text), WEIGHTS)
    return 0.0 if found.contradicts else found.credit


# ---------------------------------------------------------------- planted examples


@pytest.mark.parametrize(
    ("point", "text", "made"),
    [
        (LOCKED, LOCKED, True),
        (LOCKED, "Good that you write. " + LOCKED + " Now the bank, please.", True),
        (LOCKED, "Your number is now locked, so that the other SIM can neither call nor text.", False),  # passive order
        (LOCKED, "I have locked the number. The other SIM can no longer call or text.", True),  # over two sentences
        (LOCKED, "I have not locked your number, so the other SIM can call and text.", False),
        (LOCKED, "Which number is it?", False),
        ("Call your bank from another phone.", "Please call the bank now, from another phone if you can.", True),
        ("Call your bank from another phone.", "Do not call your bank from another phone.", False),
        ("Call your bank from another phone.", "From another phone bank your call.", False),
        ("Do not tell anybody the code.", "Do not tell anybody the code.", True),
        ("Do not tell anybody the code.", "Please tell anybody the code.", False),
    ],
)
def test_a_planted_text_makes_the_point_or_does_not(point, text, made):
    assert (credit(point, text) >= 0.75) == made


def test_the_same_words_in_another_order_make_less_of_a_point():
    """Over all wordings of the card's steps with eight content words or more."""
    says = [say for problem in CARD.problems for step in problem.steps for say in step.say]
    long = [say for say in says if len(phrase(say).stems) >= 8]
    backwards = [credit(say, " ".join(reversed(say.rstrip(".").split()))) for say in long]
    assert len(long) >= 40 and all(credit(say, say) == 1 for say in long)
    assert np.mean(backwards) < 0.1 and max(backwards) < 0.6


def test_the_best_of_several_wordings_counts():
    wordings = ["Call your bank from another phone.", LOCKED]
    assert match(wordings, Answer(LOCKED), WEIGHTS).credit == 1
    assert match(wordings, Answer("Nothing of it."), WEIGHTS).credit == 0


# ---------------------------------------------------------------- negation


def negated(text: str) -> dict[str, bool]:
    found = phrase(text)
    return dict(zip(found.stems, found.negated, strict=True))


def test_a_negation_reaches_over_the_next_words_and_no_further():
    said = negated("never restart router modem phone box")
    assert list(said.values()) == [True] * REACH + [False] * (5 - REACH)


@pytest.mark.parametrize("stop", [",", ";", ":", " (", " but", " and", " or"])
def test_a_negation_ends_at_a_comma_and_at_a_new_clause(stop):
    assert negated(f"not soon{stop} restart router") == {"soon": True, "restart": False, "router": False}


@pytest.mark.parametrize("word", [*sorted(NEGATIONS), "can’t", "couldn't"])
def test_every_negation_turns_the_point_into_its_opposite(word):
    found = match(["Send the code."], Answer(f"You {word} send code."), WEIGHTS)
    assert found.contradicts and found.credit == 1


def test_what_is_said_both_ways_is_a_contradiction_only_if_the_denial_is_much_clearer():
    said = "Call the bank from another phone."
    assert match([said], Answer("Do not call the bank from another phone."), WEIGHTS).contradicts
    both = match([said], Answer("Do not restart the phone. Call the bank from another phone."), WEIGHTS)
    assert not both.contradicts and both.credit == 1


# ---------------------------------------------------------------- what does not matter, and what weighs


def test_upper_case_and_typographic_apostrophes_change_no_credit():
    for row in shipped.gold_rows()[::40]:
        card, text = judge_study.CARDS[row["term_id"]], row["messages"][1]["content"]
        weights = checklist.weights_of(card)
        for step in card.by_problem[row["problem_id"]].steps:
            plain = match(step.say, Answer(text), weights)
            assert match(step.say, Answer(text.upper()), weights) == plain
            assert match(step.say, Answer(text.replace("’", "'")), weights) == plain
            assert match([say.upper() for say in step.say], Answer(text), weights) == plain


def test_a_word_of_every_problem_weighs_less_than_a_word_of_one():
    cards_with_common_words = 0
    for card in judge_study.CARDS.values():
        weights, stems = Weights(card), [problem.stems for problem in card.problems]
        everywhere = set.intersection(*map(set, stems))
        once = {stem for own in stems for stem in own if sum(stem in other for other in stems) == 1}
        if everywhere:
            cards_with_common_words += 1
            assert max(map(weights.of, everywhere)) < 0.5 * min(map(weights.of, once))
        assert weights.of("a stem of no problem") > max(map(weights.of, once))
    assert cards_with_common_words > 40


def test_words_of_every_problem_make_less_of_a_point_than_as_many_words_of_its_own():
    point = "Your SIM and number: ask the bank about the transfer at the counter."
    assert credit(point, "Your SIM number, phone call.") < 0.2 * credit(point, "A bank transfer at the counter.")


def test_numbers_of_a_list_are_no_part_of_its_sentences():
    assert answer_sentences("1. Open settings.\n2) Turn it on. 3. Restart.") == [
        "Open settings.", "Turn it on.", "Restart.",
    ]  # fmt: skip


def test_a_sentence_that_is_not_sound_makes_no_point():
    assert match([LOCKED], Answer(LOCKED, [False]), WEIGHTS).credit == 0
