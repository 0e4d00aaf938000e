"""Diversity figures agree with values worked out by hand."""

import math

import pytest

from telco_nb.corpus import dataset, text_measures

A, B, C = "the line is down again", "the line is down today", "my bill is too high"


def test_distinct_counts_different_n_grams():
    assert text_measures.distinct_n(["a b a", "b a"], 1) == pytest.approx(2 / 5)
    assert text_measures.distinct_n(["a b a", "b a"], 2) == pytest.approx(2 / 3)
    assert text_measures.distinct_n(["the same words again"] * 50, 1) == pytest.approx(4 / 200)
    assert text_measures.distinct_n(["alpha beta gamma delta"], 3) == 1


def test_bleu_agrees_with_a_value_worked_out_by_hand():
    """Of A's n-grams, B holds 4 of 5, 3 of 4, 2 of 3 and 1 of 2; both have 5 words, so there is no penalty."""
    by_hand = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert text_measures.bleu(A.split(), [B.split(), C.split()]) == pytest.approx(by_hand)


def test_a_short_text_pays_the_brevity_penalty():
    reference = list("abcdefgh")
    assert text_measures.bleu(reference[:4], [reference]) == pytest.approx(math.exp(1 - 8 / 4))


def test_a_word_counts_no_more_often_than_a_reference_has_it():
    assert text_measures.bleu(list("aaaaa"), [list("aab")]) == 0.0
    clipped = text_measures.bleu(list("abcdd"), [list("abcd")])
    assert clipped == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))


def test_self_bleu_is_the_mean_over_texts_and_runs_from_none_shared_to_all_alike():
    pair = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert text_measures.self_bleu([A, B, C]) == pytest.approx((pair + pair + 0) / 3)
    assert text_measures.self_bleu([A] * 5) == pytest.approx(1) and text_measures.self_bleu([A]) is None


def test_repetition_compresses_better():
    assert text_measures.compression_ratio([A] * 50) > 5 * text_measures.compression_ratio([A, B, C])


def test_self_bleu_per_cell_is_taken_within_scenarios_and_does_not_depend_on_the_order_of_rows():
    axes = {"term_id": "x", "intent": "i", "situation": "s", "customer": "c"}
    rows = [
        {"conversation_id": f"{cell}{i}", "scenario_id": cell, "text": text} | axes
        for cell, texts in {"alike": [A, A, A], "varied": [A, C, "nothing in common here at all"]}.items()
        for i, text in enumerate(texts)
    ]
    found = dataset.self_bleu_per_cell(rows, {"text": lambda row: row["text"]}, cells=2, seed=1).set_index(
        "scenario_id"
    )
    assert found.loc["alike", "self_bleu_text"] == pytest.approx(1) and found.loc["varied", "self_bleu_text"] == 0
    again = dataset.self_bleu_per_cell(rows[::-1], {"text": lambda row: row["text"]}, cells=2, seed=1)
    assert again.equals(found.reset_index())
