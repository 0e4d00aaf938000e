"""Choices by likelihood: held-out texts, crosswise pairs, figures that are a choice, and the sign of the margin."""

import json
from collections import Counter

import pytest
import shipped

from telco_nb import DATA_DIR
from telco_nb.corpus import choices
from telco_nb.corpus.cards import figures_in
from telco_nb.corpus.gold import WrittenFileError

ITEMS = choices.choice_items(shipped.cards(), shipped.gold_rows(), None)


def test_no_text_of_a_pair_stands_in_a_training_conversation():
    trained = {m["content"] for row in shipped.gold_rows() if row["split"] == "train" for m in row["messages"]}
    pairs = [pair for item in ITEMS if item.kind != "figure" for pair in item.right]
    assert len(pairs) > 1000 and not trained & {text for pair in pairs for text in pair}


def test_the_wrong_pairs_are_the_right_texts_paired_otherwise():
    for item in ITEMS:
        if item.kind != "figure":
            (one, answer_one), (two, answer_two) = item.right
            assert item.wrong == ((one, answer_two), (two, answer_one)) and answer_one != answer_two


def test_protects_first_holds_exactly_one_customer_who_must_be_protected():
    cards = {card.id: card for card in shipped.cards()}
    scenario = {row["messages"][0]["content"]: row for row in shipped.gold_rows()}
    for item in ITEMS:
        if item.kind == "protects_first":
            rows = [scenario[message] for message, _ in item.right]
            firsts = [cards[row["term_id"]].by_problem[row["problem_id"]].first for row in rows]
            assert sum(first is not None and first.when is None for first in firsts) == 1


def test_a_wrong_figure_differs_in_one_number_of_the_same_unit_by_at_most_five_times():
    figures = [item for item in ITEMS if item.kind == "figure"]
    assert len(figures) >= 30
    for item in figures:
        right, wrong = (figures_in(pairs[0][1]) for pairs in (item.right, item.wrong))
        changed = [(a, b) for a, b in zip(right, wrong, strict=True) if a != b]
        assert len(changed) == 1 and changed[0][0][1] == changed[0][1][1]
        one, two = (float(number) for number, _ in changed[0])
        assert one not in (0, 1) and two not in (0, 1) and 1 < max(one / two, two / one) <= 5


def test_a_larger_sample_holds_the_smaller_one_and_the_kinds_take_turns():
    assert choices.choice_items(shipped.cards(), shipped.gold_rows(), 30) == ITEMS[:30]
    assert set(Counter(item.kind for item in ITEMS[:30]).values()) == {10}


def test_without_gold_there_are_figures_only():
    assert {item.kind for item in choices.choice_items(shipped.cards(), [], None)} == {"figure"}


def test_a_model_that_finds_the_fitting_pairs_likelier_chooses_rightly():
    items = [*ITEMS[:6], *choices.general_items(choices.load_general(DATA_DIR / "general.jsonl"))[:2]]
    pairs = choices.pairs_table(items, choices.load_general(DATA_DIR / "general.jsonl"), 3)
    losses = {row.pair_id: 2.0 if row.fits else 3.0 for row in pairs.itertuples()}
    table = choices.chosen_table(pairs, losses).set_index("item_id")
    assert len(table) == 8 and table["right"].all() and (table["margin"] == 1.0).all()
    worse = {pair_id: 5.0 - loss for pair_id, loss in losses.items()}
    assert not choices.chosen_table(pairs, worse)["right"].any()
    equal = choices.chosen_table(pairs, dict.fromkeys(losses, 1.0))
    assert not equal["right"].any()  # an undecided model has not chosen


def test_an_answer_that_is_likely_after_anything_gains_nothing():
    (item,) = [item for item in ITEMS if item.kind == "problem"][:1]
    pairs = choices.pairs_table([item], [], None)
    favourite = item.right[0][1]
    losses = {row.pair_id: 0.1 if row.answer == favourite else 4.0 for row in pairs.itertuples()}
    assert choices.chosen_table(pairs, losses)["margin"].iloc[0] == pytest.approx(0)


def test_the_general_texts_are_96_in_six_kinds_and_none_repeats():
    texts = choices.load_general(DATA_DIR / "general.jsonl")
    assert Counter(row["kind"] for row in texts) == dict.fromkeys(dict.fromkeys(row["kind"] for row in texts), 16)
    assert len({row["text"] for row in texts}) == len({row["id"] for row in texts}) == len(texts) == 96
    assert choices.load_general(None) == []


def test_a_general_text_without_a_field_is_refused_with_its_line(tmp_path):
    file = tmp_path / "general.jsonl"
    file.write_text(json.dumps({"id": "a", "kind": "story", "prompt": "Go on."}) + "\n")
    with pytest.raises(WrittenFileError, match="line 1"):
        choices.load_general(file)
