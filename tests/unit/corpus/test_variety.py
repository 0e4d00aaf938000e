"""Diversity figures agree with values worked out by hand."""

import math

import pytest
import shipped

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
    levels = {"term_id": "x", "kind": "fault", "context": "usual"}
    rows = [
        {"conversation_id": f"{cell}{i}", "scenario_id": cell, "text": text} | levels
        for cell, texts in {"alike": [A, A, A], "varied": [A, C, "nothing in common here at all"]}.items()
        for i, text in enumerate(texts)
    ]
    parts = {"first_turn": lambda row: row["text"], "answer": lambda row: "same text each time"}
    found = dataset.self_bleu_per_cell(rows, parts, cells=2, seed=1)
    by_cell = found.set_index("scenario_id")["self_bleu_first_turn"]
    assert by_cell["alike"] == pytest.approx(1) and by_cell["varied"] == 0
    assert dataset.self_bleu_per_cell(rows[::-1], parts, cells=2, seed=1).equals(found)
    summary = dataset.self_bleu_summary(found)
    assert summary["scenarios_measured"] == 2
    assert summary["mean_by_kind"] == {"fault": {"self_bleu_first_turn": 0.5, "self_bleu_answer": 1.0}}


# --- who wrote what ----------------------------------------------------------------------------------


def row(origin, number, *texts):
    roles = ("user", "assistant") * (len(texts) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return {"conversation_id": f"{origin}{number}", "origin": origin, "messages": messages}


GOLD = [
    row(
        "gold",
        0,
        "no signal",
        "Is the light on? Restart it.",
        "yes it is on and it has been on for the whole day now",
        "Good. Thanks!",
    ),
    row("gold", 1, "the line is down", "Which line is it?"),
    row("gold", 2, "my bill is wrong", "I look at it now. RESTART it."),
]
VARIANT = [row("variant", 0, "no signal at all", "Restart it.")]


def test_the_table_compares_origins_by_values_worked_out_by_hand():
    """Gold: 4 agent messages; 2 hold a question, 2 end with “restart it.”. 4 customer messages, 3 under 12 words.

    Of the first answers' 6 + 4 - 2 + 7 - 1 = 14 word pairs, "restart it" occurs twice.
    """
    table = dataset.variety_table([*GOLD, *VARIANT], seed=1).set_index("origin")
    gold, variant = table.loc["gold"], table.loc["variant"]
    assert (gold["conversations"], gold["texts"]) == (3, 3) and (variant["conversations"], variant["texts"]) == (1, 1)
    assert (gold["asks_share"], gold["same_ending_share"], gold["short_share"]) == (2 / 4, 2 / 4, 3 / 4)
    assert (variant["asks_share"], variant["same_ending_share"], variant["short_share"]) == (0, 1, 1)
    pairs = 5 + 3 + 6
    assert gold["distinct_2"] == pytest.approx((pairs - 1) / pairs, abs=1e-4)
    assert variant["gzip_ratio"] == round(text_measures.compression_ratio(["Restart it."]), 3)


def test_origins_stand_in_the_order_of_the_rows_and_do_not_change_each_other():
    both = dataset.variety_table([*VARIANT, *GOLD], seed=1)
    assert list(both["origin"]) == ["variant", "gold"]
    assert both.iloc[[1]].reset_index(drop=True).equals(dataset.variety_table(GOLD, seed=1))


def test_variety_does_not_depend_on_the_order_of_the_rows():
    assert dataset.variety_table(GOLD[::-1], seed=1).equals(dataset.variety_table(GOLD, seed=1))


def test_the_variants_vary_less_than_gold_and_still_ask_and_end_differently():
    rows = shipped.gold_rows() + shipped.variant_rows()
    table = dataset.variety_table(rows, seed=1).set_index("origin")
    assert table.loc["variant", "distinct_2"] < table.loc["gold", "distinct_2"]
    assert table.loc["variant", "gzip_ratio"] > table.loc["gold", "gzip_ratio"]
    assert table.loc["variant", "asks_share"] > 0.2 and table.loc["variant", "same_ending_share"] < 0.02
