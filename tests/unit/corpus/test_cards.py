"""The glossary is strict: what loads is complete, unambiguous, and its figures are accounted for."""

import copy
import csv

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from telco_nb import ROOT
from telco_nb.corpus.cards import (
    Card,
    GlossaryError,
    figures_in,
    load_cards,
    overlaps,
    parse_cards,
    unknown_figures,
    write_cards,
    write_csv,
)

PATH = ROOT / "telco_nb" / "data" / "glossary.yaml"
CARDS = load_cards(PATH)


@pytest.fixture
def raw():
    """Two real cards as plain data, free to be damaged."""
    return [copy.deepcopy(card.model_dump()) for card in CARDS[:2]]


def test_the_shipped_glossary_has_52_cards_in_all_six_categories():
    assert len(CARDS) == 52
    assert {card.category for card in CARDS} == {
        "access_radio", "fixed_home", "sim_identity", "numbers_messaging", "plans_billing", "service_operations"
    }  # fmt: skip


def test_every_card_offers_at_least_one_figure_and_four_facts():
    assert all(card.figures and len(card.facts) >= 4 for card in CARDS)


def test_the_validated_json_loads_back_to_the_same_cards(tmp_path):
    write_cards(CARDS, tmp_path / "glossary.json")
    assert load_cards(tmp_path / "glossary.json") == CARDS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("facts", ["only one."]),
        ("category", "Home cooking"),
        ("definition", ""),
        ("id", "Not Snake"),
        ("aliases", [True]),
    ],
)
def test_a_faulty_card_is_refused_naming_card_and_field(raw, field, value):
    name = raw[1]["id"] if field != "id" else "Not Snake"
    raw[1][field] = value
    with pytest.raises(GlossaryError) as error:
        parse_cards(raw)
    assert name in str(error.value) and field in str(error.value)


def test_a_missing_and_an_unknown_field_are_both_named(raw):
    del raw[0]["escalate_when"]
    raw[0]["colour"] = "blue"
    with pytest.raises(GlossaryError) as error:
        parse_cards(raw)
    assert {field for _, field, _ in error.value.faults} == {"escalate_when", "colour"}


def test_every_fault_of_a_file_is_reported_at_once(raw):
    raw[0]["facts"], raw[1]["resolution"] = [], []
    with pytest.raises(GlossaryError) as error:
        parse_cards(raw)
    assert {card for card, _, _ in error.value.faults} == {raw[0]["id"], raw[1]["id"]}


def test_a_figure_that_is_not_listed_is_refused_where_it_stands(raw):
    raw[0]["facts"][2] += " It takes 1234 ms."
    with pytest.raises(GlossaryError, match=r"facts\[2\].*1234 ms"):
        parse_cards(raw)


def test_two_cards_with_one_id_are_refused(raw):
    raw[1]["id"] = raw[0]["id"]
    with pytest.raises(GlossaryError, match="used by 2 cards"):
        parse_cards(raw)


def test_an_alias_that_names_another_card_is_refused_in_any_case(raw):
    raw[1]["aliases"].append(raw[0]["term"].upper())
    with pytest.raises(GlossaryError, match="already names card"):
        parse_cards(raw)


def test_a_yaml_key_given_twice_is_refused_with_its_line(tmp_path):
    path = tmp_path / "double.yaml"
    path.write_text("- id: a\n  term: x\n  id: b\n")
    with pytest.raises(ValueError, match=r"double\.yaml.*'id' given 2 times") as error:
        load_cards(path)
    assert "line" in str(error.value)


@pytest.mark.parametrize("content", ["", "term: x", "[]", "- 5"])
def test_a_file_that_is_not_a_list_of_cards_is_refused(tmp_path, content):
    path = tmp_path / "odd.yaml"
    path.write_text(content)
    with pytest.raises(GlossaryError):
        load_cards(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5G, IPv6, WPA3, H.264, 802.11ax, Wi-Fi 6 and n78 are names", []),
        ("between 20 and 40 ms", [("20", None), ("40", "ms")]),
        ("a 30-day period and 1,024 MB", [("30", "day"), ("1024", "MB")]),
        ("EUR 50, €50 and 50 euros", [("50", "€")] * 3),
        ("99.9% of 150 Mbps", [("99.9", "%"), ("150", "Mbit/s")]),
        ("-110 dBm after 10 seconds", [("110", "dBm"), ("10", "second")]),
    ],
)
def test_figures_are_numbers_with_units_and_names_are_not_figures(text, expected):
    assert figures_in(text) == expected


def test_the_right_number_with_the_wrong_unit_is_unknown():
    card = next(card for card in CARDS if ("20", "MHz") in card.allowed_figures and card.id == "lte")
    assert unknown_figures("It is 20 MHz wide.", card) == []
    assert unknown_figures("It is 20 GB wide.", card) == ["20 GB"]


@given(number=st.integers(0, 10**6), unit=st.sampled_from(["ms", "GB", "%", "days", ""]), card=st.sampled_from(CARDS))
def test_a_figure_is_allowed_only_if_the_card_lists_its_number(number, unit, card):
    unknown = unknown_figures(f"about {number} {unit}".strip(), card)
    if str(number) not in {listed for listed, _ in card.allowed_figures}:
        assert unknown
    if (str(number), None) in card.allowed_figures:
        assert not unknown


def test_the_shipped_file_is_plain_yaml_without_traps():
    """No value is a bool or a number: `yes`, `016` or `1e3` unquoted would be."""

    def leaves(node):
        if isinstance(node, dict):
            node = node.values()
        if isinstance(node, str) or node is None:
            yield node
        else:
            for child in node:
                yield from leaves(child)

    assert all(leaf is None or isinstance(leaf, str) for leaf in leaves(yaml.safe_load(PATH.read_text())))


def test_the_most_similar_cards_come_first_and_a_copy_tops_the_list(raw):
    twin = Card.model_validate({**raw[0], "id": "twin", "term": "twin"})
    top = overlaps([*CARDS[:5], twin], top=3)
    assert set(top.iloc[0][["term_a", "term_b"]]) == {raw[0]["id"], "twin"} and top["jaccard"].iloc[0] == 1
    assert top["jaccard"].is_monotonic_decreasing


# --- tables ------------------------------------------------------------------------------------------

TABLE = ROOT / "tests" / "unit" / "corpus" / "data" / "home_insurance.csv"


@pytest.fixture
def table():
    """The rows of the insurance table, header included, free to be damaged."""
    with TABLE.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


def faults_of(table, tmp_path, **options):
    path = tmp_path / "mine.csv"
    with path.open("w", encoding=options.pop("encoding", "utf-8"), newline="") as stream:
        csv.writer(stream, **options).writerows(table)
    try:
        load_cards(path)
    except GlossaryError as error:
        return str(error)
    return ""


def cell(table, row, column):
    """(cells of the row as a spreadsheet counts them, position of the column)."""
    return table[row - 1], table[0].index(column)


def test_all_52_cards_survive_the_way_through_a_table(tmp_path):
    write_csv(CARDS, tmp_path / "cards.csv")
    assert load_cards(tmp_path / "cards.csv") == CARDS


def test_a_table_of_another_domain_loads_with_its_own_categories():
    cards = load_cards(TABLE)
    assert {card.category for card in cards} == {"claims", "perils", "pricing"}
    assert cards[0].wrong_beliefs[0].belief == "The excess is paid once a year." and cards[0].source is None
    assert cards[2].figures[1].text == "2 claims in 3 years"


def test_a_spreadsheet_with_semicolons_a_byte_order_mark_and_empty_rows_loads(table, tmp_path):
    table.insert(2, [""] * len(table[0]))
    assert faults_of(table, tmp_path, encoding="utf-8-sig", delimiter=";") == ""


@pytest.mark.parametrize(
    ("row", "column", "content", "message"),
    [
        (3, "definition", "", "row 3 (escape_of_water), column 'definition': this cell is empty"),
        (2, "facts", "One. | Two. | Three.", "row 2 (excess), column 'facts': List should have at least 4 items"),
        (2, "facts", "One. | | Three. | Four.", "row 2 (excess), column 'facts', item 2: nothing between two |"),
        (
            4,
            "wrong_beliefs",
            "It is free. | a => b",
            "row 4 (no_claims_discount), column 'wrong_beliefs', item 1: expected",
        ),
        (4, "comparisons", "a => b => c | d1 => e1", "column 'comparisons', item 1: expected 'options => advice'"),
        (5, "figures", "2 hours", "row 5 (loss_adjuster), column 'figures', item 1: expected 'text => meaning'"),
        (5, "escalate_when", "it takes 99 days", "row 5 (loss_adjuster), column 'escalate_when': figure '99 day'"),
        (5, "id", "excess", "row 2 (excess), column 'id': 'excess' used by 2 cards"),
        (5, "aliases", "Excess | adjuster", "row 5 (loss_adjuster), column 'aliases', item 1: 'Excess' already names"),
        (3, "category", "Big Perils", "row 3 (escape_of_water), column 'category': String should match"),
    ],
)
def test_a_fault_in_a_table_is_named_by_row_and_column(table, tmp_path, row, column, content, message):
    cells, place = cell(table, row, column)
    cells[place] = content
    assert message in faults_of(table, tmp_path)


def test_every_fault_of_a_table_is_reported_at_once_in_order_of_rows(table, tmp_path):
    for row, column in ((5, "term"), (2, "definition"), (3, "change_answer")):
        cells, place = cell(table, row, column)
        cells[place] = ""
    lines = faults_of(table, tmp_path).splitlines()
    assert lines[0] == "mine.csv: 3 fault(s)"
    assert [line.split(" (")[0].strip() for line in lines[1:]] == ["row 2", "row 3", "row 5"]


def test_missing_unknown_and_repeated_columns_are_named(table, tmp_path):
    table[0][table[0].index("facts")] = "fact"
    table[0][table[0].index("source")] = "id"
    message = faults_of(table, tmp_path)
    for text in ("column 'facts': this column is missing", "column 'fact': no field", "column 'id': given 2 times"):
        assert "row 1 (header), " + text in message


def test_a_row_that_is_too_short_is_named_with_its_row(table, tmp_path):
    table[3] = table[3][:-2]
    assert "row 4 (no_claims_discount), column 'change_requests': 16 cells where the header has 18" in faults_of(
        table, tmp_path
    )


def test_an_empty_table_a_wrong_encoding_and_another_ending_are_refused(table, tmp_path):
    assert "this column is missing" in faults_of([], tmp_path)
    assert "expected a non-empty list of cards" in faults_of(table[:1], tmp_path)
    (tmp_path / "latin.csv").write_bytes("id,term\nx,Übertragung".encode("latin-1"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        load_cards(tmp_path / "latin.csv")
    (tmp_path / "cards.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"\.yaml, \.csv or \.json"):
        load_cards(tmp_path / "cards.xlsx")


def test_a_text_with_a_separator_is_kept_out_of_tables(tmp_path):
    card = CARDS[0].model_copy(update={"facts": [*CARDS[0].facts[:3], "Choose a|b."]})
    with pytest.raises(ValueError, match="keep it in YAML"):
        write_csv([card], tmp_path / "cards.csv")
    assert not (tmp_path / "cards.csv").exists()
