"""The glossary is strict: what loads is complete and unambiguous, and every fault is named with its place."""

import copy
import shutil
from pathlib import Path

import pytest
import shipped
import yaml
from hypothesis import given
from hypothesis import strategies as st

from telco_nb import ROOT
from telco_nb.corpus import cards
from telco_nb.corpus.cards import GlossaryError, RawCard, figures_in, load_cards, parse_cards, unknown_figures
from telco_nb.study.input_files import read_yaml

FOLDER = ROOT / "telco_nb" / "data" / "cards"
BANKING = Path(__file__).parent / "data" / "banking"
CARDS = shipped.cards()


@pytest.fixture
def raw():
    """The banking cards as plain data by file name, free to be damaged."""
    return {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(BANKING.glob("*.yaml"))}


def faults_of(raw):
    """What is wrong with cards of plain data, as lines."""
    try:
        parse_cards([RawCard(name, values) for name, values in raw.items()], [], "banking")
    except GlossaryError as error:
        return [str(fault) for fault in error.faults]
    return []


# --- what is shipped ---------------------------------------------------------------------------------


def test_the_shipped_glossary_has_52_cards_of_six_categories_with_520_problems_of_all_kinds():
    assert len(CARDS) == 52 and sum(len(card.problems) for card in CARDS) == 520
    assert {card.category for card in CARDS} == {
        "access_radio", "fixed_home", "sim_identity", "numbers_messaging", "plans_billing", "service_operations"
    }  # fmt: skip
    assert {problem.kind for card in CARDS for problem in card.problems} == set(cards.Kind.__args__)


def test_a_shipped_card_is_named_as_its_file_and_has_facts_figures_and_wrong_beliefs():
    assert [card.id for card in CARDS] == [path.stem for path in sorted(FOLDER.glob("*.yaml"))]
    assert all(len(card.facts) >= 4 and card.figures and len(card.wrong_beliefs) >= 2 for card in CARDS)


def test_the_shipped_files_are_plain_yaml_without_traps():
    """No value but weight and needs_identity is a number or a bool: `no`, `016` or `1e3` unquoted would be."""

    def leaves(node, key=""):
        if isinstance(node, dict | list):
            for name, child in node.items() if isinstance(node, dict) else ((key, child) for child in node):
                yield from leaves(child, name)
        else:
            yield key, node

    for path in FOLDER.glob("*.yaml"):
        odd = [leaf for leaf in leaves(read_yaml(path)) if not isinstance(leaf[1], str | None)]
        assert {key for key, _ in odd} <= {"weight", "needs_identity"}, path.name


def test_a_sentence_an_agent_may_say_is_whole():
    """A text without quotes ends for YAML at " #": the code ##002# cut a sentence in the middle, without a word."""
    cut = [
        f"{card.id}.{problem.id}: {text}"
        for card in CARDS
        for problem in card.problems
        for group in (problem.ask, problem.first, *problem.steps)
        for text in (group.say if group else ())
        if not text.endswith((".", "?", "!"))
    ]
    assert cut == []


# --- loading -----------------------------------------------------------------------------------------


def test_a_folder_gives_a_card_a_file_in_the_order_of_the_names():
    assert [card.id for card in load_cards(BANKING)] == ["card_block", "overdraft", "standing_order"]


@pytest.mark.parametrize("glossary", [CARDS, load_cards(BANKING)], ids=["shipped", "banking"])
def test_the_validated_json_loads_back_to_the_same_cards_in_their_order(tmp_path, glossary):
    cards.write_cards(glossary[::-1], tmp_path / "glossary.json")
    assert load_cards(tmp_path / "glossary.json") == glossary[::-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "no YAML file and no cards.csv"), ("cards.xlsx", "a glossary is a folder"), ("none", "nothing is there")],
)
def test_a_place_without_a_glossary_is_refused_with_what_one_is(tmp_path, name, message):
    (tmp_path / "cards.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=message):
        load_cards(tmp_path / name)


def test_a_yaml_key_given_twice_is_refused_with_file_and_line(tmp_path):
    shutil.copytree(BANKING, tmp_path, dirs_exist_ok=True)
    (tmp_path / "double.yaml").write_text("id: a\nterm: x\nid: b\n")
    with pytest.raises(ValueError, match=r"double\.yaml, line 1: .*the key 'id' stands twice"):
        load_cards(tmp_path)


@pytest.mark.parametrize("content", ["", "5", "[]", "- id: a", "just words"])
def test_a_file_that_is_no_card_is_refused_by_name(tmp_path, content):
    (tmp_path / "odd.yaml").write_text(content)
    with pytest.raises(GlossaryError, match=r"odd\.yaml: card '\(no id\)'"):
        load_cards(tmp_path)


@pytest.mark.parametrize("content", ["{", '"id"', "[]", "\ud800"])
def test_a_json_file_that_is_no_list_of_cards_is_refused_by_name(tmp_path, content):
    (tmp_path / "glossary.json").write_bytes(content.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"glossary\.json"):
        load_cards(tmp_path / "glossary.json")


# --- faults, by name ---------------------------------------------------------------------------------

CARD = "card_block.yaml: card 'card_block', "
PROBLEM = "card_block.yaml: card 'card_block', problem 'pin_refused', "


def card_with(field, value):
    return lambda raw: raw["card_block.yaml"].__setitem__(field, value)


def problem_with(field, value):
    return lambda raw: raw["card_block.yaml"]["problems"][1].__setitem__(field, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (card_with("category", "Home cooking"), CARD + "category: String should match"),
        (card_with("definition", ""), CARD + "definition: String should have at least 2"),
        (card_with("aliases", [True]), CARD + "aliases[0]: Input should be a valid string (got True)"),
        (card_with("facts", []), CARD + "facts: List should have at least 1"),
        (card_with("problems", []), CARD + "problems: List should have at least 1"),
        (card_with("id", "Card Block"), "card_block.yaml: card 'Card Block', id: String should match"),
        (card_with("colour", "blue"), CARD + "colour: Extra inputs are not permitted (got 'blue')"),
        (lambda raw: raw["card_block.yaml"].pop("source"), CARD + "source: Field required"),
        (lambda raw: raw["card_block.yaml"]["problems"][1].pop("cause"), PROBLEM + "cause: Field required"),
        (problem_with("steps", []), PROBLEM + "steps: List should have at least 1"),
        (problem_with("says", ["pin blocked"] * 4), PROBLEM + "says: List should have at least 5"),
        (problem_with("kind", "nuisance"), PROBLEM + "kind: Input should be 'fault', 'charge'"),
        (problem_with("weight", "0.35"), PROBLEM + "weight: Input should be a valid number (got '0.35')"),
        (problem_with("weight", 1.35), PROBLEM + "weight: Input should be less than or equal to 1"),
        (problem_with("ask", {"what": "the PIN", "say": []}), PROBLEM + "ask.say: List should have at least 1"),
        (problem_with("valid_until", 2030), PROBLEM + "valid_until: Input should be a valid string"),
        (problem_with("id", None), "card_block.yaml: card 'card_block', problem 'number 2', id: Input should be"),
    ],
)
def test_a_fault_names_file_card_problem_and_field(raw, damage, message):
    damage(raw)
    assert [line for line in faults_of(raw) if line.startswith(message)], faults_of(raw)


def test_a_fault_in_a_step_names_the_step(raw):
    raw["overdraft.yaml"]["problems"][0]["steps"][1]["who"] = "bank"
    (line,) = faults_of(raw)
    assert line.startswith("overdraft.yaml: card 'overdraft', problem 'interest_not_expected', steps[1].who: Input")


def test_all_faults_of_all_cards_are_reported_at_once(raw):
    raw["card_block.yaml"]["facts"], raw["overdraft.yaml"]["term"] = [], ""
    raw["overdraft.yaml"]["problems"][2]["done"] = None
    raw["standing_order.yaml"]["problems"][0]["weight"] = 0.5
    with pytest.raises(GlossaryError) as error:
        parse_cards([RawCard(name, values) for name, values in raw.items()], [], "banking")
    places = [(fault.file, fault.problem, fault.field) for fault in error.value.faults]
    assert places == [
        ("card_block.yaml", "", "facts"),
        ("overdraft.yaml", "", "term"),
        ("overdraft.yaml", "balance_misread", "done"),
        ("standing_order.yaml", "", "problems"),
    ]
    assert str(error.value).splitlines()[0] == "banking: 4 fault(s)"


def test_of_very_many_faults_the_message_shows_forty_and_counts_the_rest(raw):
    raw = {f"{i}.yaml": {"id": "x"} for i in range(10)}
    with pytest.raises(GlossaryError) as error:
        parse_cards([RawCard(name, values) for name, values in raw.items()], [], "many")
    assert len(error.value.faults) == 90
    assert len(str(error.value).splitlines()) == 42 and str(error.value).endswith("and 50 more")


def test_no_card_at_all_is_refused():
    with pytest.raises(GlossaryError, match="no card is given"):
        parse_cards([], [], "banking")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda card: card.update(id="card_block"), "id: 'card_block' already names card 'card_block'"),
        (lambda card: card.update(term="CARD BLOCK"), "term: 'CARD BLOCK' already names card 'card_block'"),
        (lambda card: card["aliases"].append("Card freeze"), "aliases[3]: 'Card freeze' already names card"),
        (lambda card: card["problems"][1].update(id="balance_misread"), "id: given 2 times in this card"),
    ],
)
def test_a_name_that_is_given_twice_is_refused_in_any_case(raw, damage, message):
    damage(raw["overdraft.yaml"])
    assert any(line.startswith("overdraft.yaml: ") and message in line for line in faults_of(raw)), faults_of(raw)


@pytest.mark.parametrize(("weight", "total"), [(0.3, "0.95"), (0.4, "1.05")])
def test_weights_that_do_not_sum_to_1_are_refused_with_their_sum(raw, weight, total):
    raw["card_block.yaml"]["problems"][1]["weight"] = weight
    assert faults_of(raw) == [f"{CARD}problems: the weights sum to {total}, not to 1"]


def test_weights_may_sum_to_1_up_to_rounding(raw):
    for problem, weight in zip(raw["overdraft.yaml"]["problems"], (0.33, 0.33, 0.33), strict=True):
        problem["weight"] = weight
    assert faults_of(raw) == []


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda card, text: card["facts"][2].update(text=text), "facts[2].text"),
        (lambda card, text: card["problems"][1]["says"].append(text), "problem 'pin_refused', says[5]"),
        (lambda card, text: card["problems"][1]["steps"][0]["say"].append(text), "steps[0].say[2]"),
        (lambda card, text: card["problems"][1]["contexts"].update(branch=text), "contexts.branch"),
    ],
)
def test_personal_data_are_refused_where_they_stand_and_the_owner_reads_what_is_meant(raw, damage, place):
    damage(raw["card_block.yaml"], "Write to jane.doe@gmail.com about it.")
    (line,) = faults_of(raw)
    assert line.startswith(CARD) and f"{place}: 'jane.doe@gmail.com' looks like personal data (email)" in line


def test_a_problem_with_other_contexts_than_the_first_is_refused_by_name(raw):
    contexts = raw["standing_order.yaml"]["problems"][0]["contexts"]
    contexts["at_sea"] = contexts.pop("abroad")
    (line,) = faults_of(raw)
    assert line.startswith("standing_order.yaml: card 'standing_order', problem 'amount_to_change', contexts: ")
    assert line.endswith("branch, at_sea given, but other problems have branch, abroad")


# --- figures -----------------------------------------------------------------------------------------


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


BLOCK = load_cards(BANKING)[0]  # 5 working days, 13 months, 3 wrong PINs


@pytest.mark.parametrize(
    ("answer", "customer", "unknown"),
    [
        ("It comes within 5 working days.", "", []),
        ("It comes within 5 business days.", "", []),
        ("It comes within 5 weeks.", "", ["5 week"]),
        ("It comes in 13 to 20 months.", "", ["20 month"]),
        ("Between 13 and 13 months.", "", []),
        ("Press 2, then 7.", "", []),
        ("Press 27.", "", ["27"]),
        ("The 64 euros are reported.", "a payment of 64 euros is not mine", []),
        ("The 64.00 euros are reported.", "a payment of 64 euros is not mine", []),
        ("Your 40 euros are too much.", "rent is 780 now not 740", []),
        ("Together that makes EUR 1520.", "rent is 780 now and 740 before", []),
        ("Your 30 euros are too much.", "rent is 780 now not 740", ["30 €"]),
        ("That makes EUR 57.50.", "you took 23.40 and then 34.10", []),
        ("That makes EUR 71.", "20 and 21 and 30", ["71 €"]),
    ],
)
def test_an_answer_may_say_figures_of_the_card_of_the_customer_and_sums_or_differences_of_two_of_these(
    answer, customer, unknown
):
    assert unknown_figures(answer, BLOCK, customer) == unknown


def test_what_customers_say_on_a_card_allows_no_figure():
    assert "64 euros" in BLOCK.problems[0].says[2] and unknown_figures("The 64 euros are gone.", BLOCK) == ["64 €"]


@given(number=st.integers(0, 10**6), unit=st.sampled_from(["ms", "GB", "%", "days", ""]), card=st.sampled_from(CARDS))
def test_a_figure_is_allowed_only_if_the_card_holds_its_number_or_it_is_a_bare_digit(number, unit, card):
    unknown = unknown_figures(f"about {number} {unit}".strip(), card)
    held = str(number) in {listed for listed, _ in card.allowed_figures}
    if not held and (unit or number > 9):
        assert unknown
    if (str(number), None) in card.allowed_figures or (not unit and (held or number <= 9)):
        assert not unknown


# --- tables for the notebook -------------------------------------------------------------------------


def test_the_table_of_cards_counts_their_parts():
    row = cards.cards_table(load_cards(BANKING)).set_index("term_id").loc["card_block"]
    expected = {"aliases": 3, "facts": 6, "figures": 3, "problems": 2, "steps": 7, "protective_steps": 1}
    assert row[list(expected)].to_dict() == expected and row["has_source"] and row["agent_words"] > 500


def test_the_table_of_problems_has_a_row_each_and_says_what_comes_first():
    table = cards.problems_table(load_cards(BANKING)).set_index("problem_id")
    assert list(table.index) == [
        "lost_or_stolen", "pin_refused", "interest_not_expected", "limit_to_raise", "balance_misread",
        "amount_to_change",
    ]  # fmt: skip
    assert list(table["protects_first"]) == [True, False, False, True, False, True]
    assert list(table["asks_first"]) == [True, True, True, True, False, True]
    assert list(table["needs_identity"]) == [True, True, True, True, False, True]
    assert table.loc["balance_misread", "applies_in"] == "DE, AT"
    assert table.loc["amount_to_change", "valid_until"] == "2030-12-31"
    assert table.groupby("term_id")["weight"].sum().round(6).eq(1).all()


def test_the_shipped_problems_make_520_rows_whose_weights_sum_to_1_a_term():
    table = cards.problems_table(CARDS)
    assert len(table) == 520 and ((table.groupby("term_id")["weight"].sum() - 1).abs() < 0.015).all()


def test_the_most_similar_cards_come_first_and_a_copy_tops_the_list():
    twin = CARDS[0].model_copy(update={"id": "twin", "term": "twin"})
    top = cards.overlaps([*CARDS[:5], twin], top=3)
    assert set(top.iloc[0][["term_a", "term_b"]]) == {CARDS[0].id, "twin"} and top["jaccard"].iloc[0] == 1
    assert top["jaccard"].is_monotonic_decreasing and len(top) == 3


def test_no_two_shipped_cards_say_the_same():
    assert cards.overlaps(CARDS, top=1)["jaccard"].iloc[0] < 0.1


def test_parsing_leaves_the_raw_cards_as_they_were(raw):
    before = copy.deepcopy(raw)
    assert faults_of(raw) == [] and raw == before
