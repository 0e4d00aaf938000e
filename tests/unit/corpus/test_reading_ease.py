"""Reading ease agrees with values worked out by hand."""

import pytest
import shipped

from telco_nb.corpus import cards, text_measures

CARDS = shipped.cards()


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("cat", 1), ("router", 2), ("network", 2), ("activate", 3), ("phone", 1), ("takes", 1), ("asked", 1),
        ("started", 2), ("table", 2), ("glasses", 2), ("messages", 3), ("the", 1), ("DNS", 3), ("rhythm", 1),
    ],
)  # fmt: skip
def test_syllables_of_common_words_are_right(word, count):
    assert text_measures.syllables(word) == count


def test_reading_ease_agrees_with_a_value_worked_out_by_hand():
    """Two sentences, 8 words, 10 syllables: The(1) router(2) is(1) off(1). Turn(1) it(1) on(1) again(2)."""
    by_hand = 206.835 - 1.015 * 8 / 2 - 84.6 * 10 / 8
    assert text_measures.flesch_reading_ease("The router is off. Turn it on again.") == pytest.approx(by_hand)


def test_long_words_in_long_sentences_read_harder():
    hard = "Interoperability considerations necessitate comprehensive reconfiguration of provisioning infrastructure."
    assert (
        text_measures.flesch_reading_ease(hard)
        < 0
        < 80
        < text_measures.flesch_reading_ease("We will call you. It is free.")
    )


def test_a_text_without_words_is_refused():
    with pytest.raises(ValueError, match="without words"):
        text_measures.flesch_reading_ease("123 - 456")


def test_every_card_can_be_read_by_an_ordinary_customer():
    table = cards.readability_table(CARDS)
    assert len(table) == 52 and table["reading_ease"].min() > 55 and table["words_per_sentence"].max() < 30
