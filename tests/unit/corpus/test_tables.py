"""A glossary in two tables: whatever a spreadsheet does to a CSV file is read, or refused with its row and column."""

import csv
import io
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import card_tables
import pytest
import shipped
from hypothesis import given, settings
from hypothesis import strategies as st

from telco_nb import DATA_DIR
from telco_nb.corpus import dataset, scenarios, tables, variants
from telco_nb.corpus.cards import Card, GlossaryError, load_cards

DATA = Path(__file__).parent / "data"
BANKING, TABLES = load_cards(DATA / "banking"), DATA / "banking_tables"
CONTEXTS = scenarios.load_contexts(DATA / "banking_contexts.yaml")


def rows_of(name):
    """The rows of a banking table, column names included, free to be damaged."""
    return list(csv.reader((TABLES / name).read_text(encoding="utf-8-sig").splitlines()))


def text_of(rows, separator=",", ends="\r\n", quoting=csv.QUOTE_MINIMAL):
    stream = io.StringIO()
    csv.writer(stream, delimiter=separator, lineterminator=ends, quoting=quoting).writerows(rows)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder with both banking tables, free to be damaged."""
    return Path(shutil.copytree(TABLES, tmp_path, dirs_exist_ok=True))


def damaged(folder, name, change):
    """What is wrong after `change` of a table's rows, as lines; [] if the banking cards can be read."""
    rows = rows_of(name)
    change(rows)
    (folder / name).write_text(text_of(rows), encoding="utf-8")
    return faults_of(folder)


def faults_of(folder):
    try:
        load_cards(folder)
    except GlossaryError as error:
        return [str(fault) for fault in error.faults]
    return []


def put(row, column, content):
    """A change that writes into a cell; rows are counted as in a spreadsheet."""
    return lambda rows: rows[row - 1].__setitem__(rows[0].index(column), content)


# --- there and back ----------------------------------------------------------------------------------


def test_the_banking_tables_hold_the_same_cards_as_the_yaml_files():
    assert load_cards(TABLES) == BANKING
    assert [len(card.problems) for card in BANKING] == [2, 3, 1]


def test_written_tables_are_read_back_to_equal_cards_in_the_same_order(folder):
    card_tables.write_tables(BANKING[::-1], folder)
    assert load_cards(folder) == BANKING[::-1]


def test_all_shipped_cards_survive_tables_apart_from_countries_and_dates_of_single_facts(tmp_path):
    def plain(items):
        return [item.model_copy(update={"applies_in": "any", "valid_until": None}) for item in items]

    cards = [c.model_copy(update={"facts": plain(c.facts), "figures": plain(c.figures)}) for c in shipped.cards()]
    card_tables.write_tables(cards, tmp_path)
    assert load_cards(tmp_path) == cards


def test_a_spreadsheet_reads_the_written_tables_as_utf8(folder):
    card_tables.write_tables(BANKING, folder)
    assert all((folder / name).read_bytes().startswith(b"\xef\xbb\xbf") for name in tables.NAMES)


@given(
    text=st.text(st.sampled_from("ab |=>/:,;\t\"'\n\r[identity]#“é0"), min_size=2, max_size=12),
    place=st.sampled_from(["definition", "aliases", "facts", "cause", "says", "do", "say", "first_when", "contexts"]),
)
@settings(max_examples=100, deadline=None)
def test_any_text_is_read_back_as_it_was_or_refused_at_writing(text, place):
    values = BANKING[2].model_dump()
    problem = values["problems"][0]
    places: dict[str, tuple[Any, Any]] = {
        "definition": (values, "definition"), "aliases": (values["aliases"], 0), "facts": (values["facts"][0], "text"),
        "cause": (problem, "cause"), "says": (problem["says"], 1), "do": (problem["steps"][0], "do"),
        "say": (problem["steps"][0]["say"], 1), "first_when": (problem["first"], "when"),
        "contexts": (problem["contexts"], "branch"),
    }  # fmt: skip
    holder, key = places[place]
    holder[key] = text if len(text.strip()) > 1 else "aa"
    card = Card.model_validate(values)
    with tempfile.TemporaryDirectory() as folder:
        try:
            card_tables.write_tables([card], Path(folder))
        except ValueError as error:
            assert re.match(r"card standing_order(, problem amount_to_change)?, \w+: a table cannot hold", str(error))
        else:
            (raw,), faults = tables.read_tables(*(Path(folder) / name for name in tables.NAMES))
            assert Card.model_validate(raw.values) == card and not faults


FACT = BANKING[0].facts[0]


@pytest.mark.parametrize(
    ("update", "column"),
    [
        ({"facts": [FACT.model_copy(update={"applies_in": "UK"})]}, "facts"),
        ({"facts": [FACT.model_copy(update={"valid_until": "2030-12-31"})]}, "facts"),
        ({"facts": [FACT.model_copy(update={"text": "Choose a|b."})]}, "facts"),
        ({"figures": [BANKING[0].figures[0].model_copy(update={"applies_in": "UK"})]}, "figures"),
        ({"aliases": ["card => block"]}, None),
        ({"definition": "Two\nlines."}, "definition"),
        ({"source": "#NAME?"}, "source"),
    ],
)
def test_what_a_table_cannot_hold_is_refused_by_card_and_column_and_nothing_is_written(tmp_path, update, column):
    card = BANKING[0].model_copy(update=update)
    if column is None:  # => divides nothing in a list of plain texts
        card_tables.write_tables([card], tmp_path)
        assert load_cards(tmp_path) == [card]
        return
    with pytest.raises(ValueError, match=rf"card card_block, {column}: a table cannot hold this"):
        card_tables.write_tables([card], tmp_path)
    assert not list(tmp_path.iterdir())


# --- what a spreadsheet does to a file, and is read --------------------------------------------------


def decimal_commas(rows):
    for row in rows[1:] if "weight" in rows[0] else []:
        place = rows[0].index("weight")
        row[place] = row[place].replace(".", ",")


def respelt(rows):
    rows[0] = [f" {name.replace('_', ' ').title()} " for name in rows[0]]


def spread(rows):
    """Line breaks at the signs of the cells, as one types them with Alt and Enter."""
    for row in rows[1:]:
        row[:] = [cell.replace(" | ", "\n| ").replace(" // ", "\n// ") for cell in row]


def empty_around(rows):
    for row in rows:
        row += ["", " ", ""]
    rows[2:2] = [[], [""] * len(rows[0])]
    rows += [[""] * len(rows[0])] * 3


def without_empty_ends(rows):
    for row in rows:
        while not row[-1]:
            row.pop()


QUIRKS = {
    "byte order mark": {"encoding": "utf-8-sig"},
    "no byte order mark": {"encoding": "utf-8"},
    "UTF-16, Excel's Unicode text": {"encoding": "utf-16", "separator": "\t"},
    "semicolons": {"separator": ";"},
    "tabs": {"separator": "\t"},
    "a line sep=;": {"separator": ";", "before": "sep=;\r\n"},
    "a line sep=, that was saved again": {"before": '"sep=,",,,,\r\n'},
    "line ends of Unix": {"ends": "\n"},
    "line ends of an old Mac": {"ends": "\r"},
    "all cells quoted": {"quoting": csv.QUOTE_ALL},
    "all cells quoted, semicolons": {"quoting": csv.QUOTE_ALL, "separator": ";"},
    "decimal commas, semicolons": {
        "separator": ";",
        "change": decimal_commas,
    },
    "decimal commas in quotes": {"change": decimal_commas},
    "capitals and spaces in the names of columns": {"change": respelt},
    "line breaks in cells": {"change": spread},
    "line breaks in cells, old Mac": {"change": spread, "ends": "\r", "quoting": csv.QUOTE_ALL},
    "empty rows and columns": {"change": empty_around},
    "empty cells left out at the end of rows": {"change": without_empty_ends},
    "columns in another order": {"change": lambda rows: [row.reverse() for row in rows]},
}


@pytest.mark.parametrize("quirk", QUIRKS.values(), ids=QUIRKS)
def test_what_a_spreadsheet_does_to_a_file_changes_no_card(tmp_path, quirk):
    for name in tables.NAMES:
        rows = rows_of(name)
        quirk.get("change", list)(rows)
        layout = {key: quirk[key] for key in ("separator", "ends", "quoting") if key in quirk}
        text = quirk.get("before", "") + text_of(rows, **layout)
        (tmp_path / name).write_bytes(text.encode(quirk.get("encoding", "utf-8")))
    assert load_cards(tmp_path) == BANKING


def test_smart_quotes_and_accents_are_text(folder):
    assert damaged(folder, "cards.csv", put(2, "definition", "A “block” stops the card’s payments, déjà vu.")) == []
    assert load_cards(folder)[0].definition == "A “block” stops the card’s payments, déjà vu."


def test_who_and_kind_may_be_written_with_capitals(folder):
    for column, content in (
        ("kind", "Fraud"),
        ("first_who", "Agent"),
        ("steps", "Agent: wait => Wait. // Please wait."),
    ):
        assert damaged(folder, "problems.csv", put(2, column, content)) == []


def test_wordings_are_divided_by_a_double_slash_and_addresses_are_not(folder):
    cell = (
        "agent: tell [Identity] => See https://bank.example/help. // and/or 24/7 // Call us.|customer:wait=>Wait now."
    )
    assert damaged(folder, "problems.csv", put(2, "steps", cell)) == []
    one, two = load_cards(folder)[0].problems[0].steps
    assert one.say == ["See https://bank.example/help.", "and/or 24/7", "Call us."] and one.needs_identity
    assert (two.who, two.do, two.say, two.needs_identity) == ("customer", "wait", ["Wait now."], False)


def test_columns_with_a_default_may_be_left_out(folder):
    def change(rows):
        gone = [rows[0].index(name) for name in ("applies_in", "valid_until", "facts")]
        rows[:] = [[cell for i, cell in enumerate(row) if i not in gone] for row in rows]

    assert damaged(folder, "problems.csv", change) == []
    problem = load_cards(folder)[0].problems[0]
    assert (problem.applies_in, problem.valid_until, problem.facts) == ("any", None, [])


# --- what is refused, by name ------------------------------------------------------------------------

FIRST = "card 'card_block', problem 'lost_or_stolen', "


@pytest.mark.parametrize(
    ("name", "row", "column", "content", "message"),
    [
        ("cards.csv", 2, "definition", "", "row 2: card 'card_block', definition: this cell is empty"),
        ("cards.csv", 3, "category", "Home Loans", "row 3: card 'overdraft', category: String should match"),
        ("cards.csv", 2, "id", "Card Block", "row 2: card 'Card Block', id: String should match"),
        ("cards.csv", 2, "facts", "One. | | Three.", "row 2: card 'card_block', facts: item 2: a | with nothing"),
        ("cards.csv", 2, "facts", "One. | 2", "row 2: card 'card_block', facts: item 2: String should have at least 2"),
        ("cards.csv", 2, "figures", "5 days", "row 2: card 'card_block', figures: item 1: “text => meaning” is"),
        ("cards.csv", 2, "wrong_beliefs", "No. => a => b", "wrong_beliefs: item 1: “belief => correction” is expected"),
        ("cards.csv", 2, "source", "#NAME?", "row 2: source: the spreadsheet shows #NAME?"),
        ("cards.csv", 2, "source", "#WERT!", "row 2: source: the spreadsheet shows #WERT!"),
        ("cards.csv", 2, "source", "#########", "row 2: source: the spreadsheet shows #########"),
        ("cards.csv", 2, "source", "Directive fÃ¼r PSD2", "row 2: source: 'Ã¼' is a letter that was read in a wrong"),
        ("cards.csv", 3, "term", "Card block", "row 3: card 'overdraft', term: 'Card block' already names"),
        ("cards.csv", 3, "aliases", "limit | card freeze", "aliases: item 2: 'card freeze' already names"),
        ("problems.csv", 2, "card", "credit", "row 2: card 'credit', problem 'lost_or_stolen', card: cards.csv has no"),
        ("problems.csv", 2, "id", "", "row 2: card 'card_block', id: this cell is empty"),
        ("problems.csv", 2, "id", "pin_refused", "row 3: card 'card_block', problem 'pin_refused', id: given 2 times"),
        ("problems.csv", 2, "weight", "24. Jan", f"row 2: {FIRST}weight: '24. Jan' is no number such as 0.24. Has"),
        ("problems.csv", 2, "weight", "65%", f"row 2: {FIRST}weight: '65%' is no number"),
        ("problems.csv", 2, "weight", "1.65", f"row 2: {FIRST}weight: Input should be less than or equal to 1"),
        ("problems.csv", 2, "weight", "0.6", "rows 2, 3: card 'card_block', weight: the weights sum to 0.95, not to 1"),
        ("problems.csv", 2, "kind", "nuisance", f"row 2: {FIRST}kind: Input should be 'fault', 'charge'"),
        ("problems.csv", 2, "says", "a b | c d", f"row 2: {FIRST}says: List should have at least 5 items"),
        ("problems.csv", 2, "ask_say", "", f"row 2: {FIRST}ask_say: this cell is empty, but ask is filled"),
        ("problems.csv", 2, "first_do", "", f"row 2: {FIRST}first_do: this cell is empty, but first_who is filled"),
        ("problems.csv", 3, "first_when", "if lost", "problem 'pin_refused', first_say: this cell is empty, but"),
        ("problems.csv", 2, "first_who", "bank", f"row 2: {FIRST}first_who: Input should be 'customer' or 'agent'"),
        ("problems.csv", 2, "steps", "wait", f"row 2: {FIRST}steps: item 1: “who: do => wording // wording” is"),
        ("problems.csv", 2, "steps", "bank: wait => Wait.", f"row 2: {FIRST}steps: item 1: Input should be 'customer'"),
        ("problems.csv", 2, "steps", "agent: wait => Wait. //", f"row 2: {FIRST}steps: item 1: a => or // with no"),
        ("problems.csv", 4, "context_abroad", "", "'interest_not_expected', context_abroad: this cell is empty"),
        ("problems.csv", 2, "context_branch", "write to jane.doe@gmail.com", f"{FIRST}context_branch: 'jane.doe@gmail"),
        ("problems.csv", 2, "steps", "agent: a b => Hi. | agent: go => To jane.doe@gmail.com.", "steps: item 2: 'jane"),
    ],
)  # fmt: skip
def test_a_fault_in_a_cell_is_named_once_with_its_table_row_and_column(folder, name, row, column, content, message):
    found = damaged(folder, name, put(row, column, content))
    named = [line for line in found if line.startswith(f"{name}, row") and message in line]
    assert len(named) == 1, found


@pytest.mark.parametrize(
    ("name", "change", "messages"),
    [
        ("cards.csv", put(1, "facts", "fact"), ["facts: this column is missing", "fact: there is no column of this"]),
        ("cards.csv", put(1, "source", "ID"), ["id: this column is given 2 times", "source: this column is missing"]),
        ("problems.csv", put(1, "context_branch", "branch"), ["branch: there is no column of this name"]),
        (
            "problems.csv",
            lambda rows: rows.__setitem__(0, [name.replace("context_", "ctx ") for name in rows[0]]),
            ["context_…: no such column", "ctx_branch: there is no", "ctx_abroad: there is no"],
        ),
        ("cards.csv", lambda rows: rows.clear(), ["(row): the table is empty"]),
    ],
)
def test_missing_unknown_and_repeated_columns_are_named_at_once(folder, name, change, messages):
    found = damaged(folder, name, change)
    assert len(found) == len(messages)
    assert all(any(line.startswith(f"{name}, row 1: {message}") for line in found) for message in messages), found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[2].append("too"), "problems.csv, row 3: (row): 'too' is cell 23 of this row, and row 1"),
        (lambda rows: rows[2].__delitem__(slice(-2, None)), "problems.csv, row 3: (row): this row ends before 'cont"),
        (lambda rows: rows[2].__delitem__(slice(3, None)), "problems.csv, row 3: (row): this row ends before 'kind'"),
    ],
)  # fmt: skip
def test_a_row_with_more_or_fewer_cells_than_columns_is_the_one_fault_that_is_named(folder, change, message):
    (line,) = damaged(folder, "problems.csv", change)
    assert line.startswith(message) and "quotation mark missing" in line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"A card block stops', "A card block stops", r"cards\.csv, row 2: \(row\): .* is cell 10 .*holds commas\?"),
        ('"A card block stops', "“A card block stops", r"cards\.csv, row 2: \(row\): "),
        ("card is made.\"", "card is made.", r"cards\.csv, row 2: \(row\): the quotation marks do not match"),
        ("overdraft,over", 'overdraft,"over', r"cards\.csv, row 3: \(row\): the quotation marks do not match"),
    ],
)  # fmt: skip
def test_a_missing_quotation_mark_is_refused_in_its_row(folder, old, new, message):
    text = (folder / "cards.csv").read_text(encoding="utf-8-sig")
    assert old in text
    (folder / "cards.csv").write_text(text.replace(old, new, 1), encoding="utf-8")
    assert any(re.match(message, line) for line in faults_of(folder)), faults_of(folder)


def test_faults_of_both_tables_are_reported_at_once_with_rows_as_a_spreadsheet_counts_them(folder):
    damaged(folder, "cards.csv", put(4, "term", ""))

    def change(rows):
        put(2, "weight", "#####")(rows)
        put(2, "done", "")(rows)
        put(5, "kind", "none")(rows)
        rows[1][rows[0].index("cause")] = "lost,\nor stolen"  # a line break in a cell is no row
        rows.insert(1, [])  # an empty row is one

    found = damaged(folder, "problems.csv", change)
    assert [line.partition(": ")[0] for line in found].count("cards.csv, row 4") == 1
    for message in (
        "problems.csv, row 3: weight: the spreadsheet shows #####",
        "problems.csv, row 3: card 'card_block', problem 'lost_or_stolen', done: this cell is empty",
        "problems.csv, row 6: card 'overdraft', problem 'limit_to_raise', kind: Input should be",
    ):
        assert any(line.startswith(message) for line in found), found


def test_a_card_without_problems_is_refused_by_name(folder):
    (line,) = damaged(folder, "problems.csv", lambda rows: rows.pop())
    assert line == "cards.csv, row 4: card 'standing_order', id: problems.csv has no row with this card"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,term\nx,Übertragung".encode("cp1252"), "cards.csv, line 2: this is not a text in UTF-8.*CSV UTF-8"),
        ("id,term\nx,“y”".encode("mac_roman"), "cards.csv, line 2: this is not a text in UTF-8"),
        (b"PK\x03\x04\x14\x00\x06\x00\x08\x00\x00\x00!\x00", "cards.csv: this is not a text in UTF-8"),
        ("id,term\nx,yes".encode("utf-16-le"), "cards.csv: this is not a text in UTF-8"),
    ],
)
def test_another_encoding_and_a_workbook_are_refused_with_the_way_out(folder, content, message):
    (folder / "cards.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_cards(folder)


# --- which files, and tables of other kinds ----------------------------------------------------------


def test_the_names_of_the_tables_may_be_in_capitals(folder):
    (folder / "cards.csv").rename(folder / "Cards.CSV")
    (folder / "contexts.yaml").write_text("contexts: []")  # another file beside them is no card
    assert load_cards(folder) == BANKING
    assert tables.find_tables(DATA / "banking") is None


@pytest.mark.parametrize("name", tables.NAMES)
def test_one_table_without_the_other_is_refused_by_name(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"no {name}.*one cards.csv and one problems.csv"):
        load_cards(folder)


def test_a_table_that_is_there_twice_is_refused_by_name(folder):
    shutil.copy(folder / "cards.csv", folder / "CARDS.csv")
    if len(list(folder.iterdir())) == 3:  # not where capitals make no difference
        with pytest.raises(ValueError, match=r"CARDS\.csv, cards\.csv"):
            load_cards(folder)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("Prompt;Reference\nmy card, it is gone;Block it.\n", [(2, "my card, it is gone")]),
        ("prompt\nmy card, it is gone\n", [(2, "my card, it is gone")]),  # one column, saved where ; separates
        ('prompt,reference\n"one\ntwo",a\n\nthree\n', [(2, "one\ntwo"), (4, "three")]),
    ],
)
def test_any_table_is_read_with_line_breaks_kept_and_rows_counted_as_a_spreadsheet_does(tmp_path, text, rows):
    (tmp_path / "prompts.csv").write_text(text, encoding="utf-8")
    assert [(number, cells["prompt"]) for number, cells in tables.read_csv(tmp_path / "prompts.csv")] == rows


def test_all_faults_of_any_table_are_named_with_row_and_column(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,term\na,b,c\n#REF!,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompts\.csv, row 2: \(row\)(.|\n)*prompts\.csv, row 3: prompt: the spread"):
        list(tables.read_csv(tmp_path / "prompts.csv"))


# --- another domain, all the way ---------------------------------------------------------------------


def test_the_banking_glossary_gives_conversations_in_every_split():
    grid = scenarios.build_scenarios(load_cards(TABLES), CONTEXTS, [])
    assert len(grid) == 6 * 2 and set(Counter(scenario.split for scenario in grid)) == {"train", "val", "test"}
    rows = list(variants.write_variants(BANKING, grid, CONTEXTS, range(12)))
    kept, rejects, counts = dataset.apply_filters(rows, BANKING)
    assert len(rows) == 12 * 12 == len(kept) + len(rejects)
    assert {row["split"] for row in kept} == {"train", "val", "test"}
    single = sum(n for reason, n in counts.items() if "duplicate" not in reason and "similar" not in reason)
    assert single == 0, rejects[["conversation_id", "reason", "detail"]].to_string()


def test_the_worked_example_of_the_guide_is_a_glossary(tmp_path):
    tables_in_guide: dict[str, list[list[str]]] = {}
    for line in (DATA_DIR / "OWN_GLOSSARY.md").read_text(encoding="utf-8").splitlines():
        names, _, values = line.strip("| ").partition(" | ")
        if names in tables.NAMES:
            rows = tables_in_guide[names] = [[], []]
        elif tables_in_guide and values:
            cells = re.findall(r"`([^`]*)`|(\(empty\))", values.replace("\\|", "|"))
            columns = names.split(", ")
            rows[0] += columns
            rows[1] += [text for text, _ in cells] if cells else [""] * len(columns)
    for name, rows in tables_in_guide.items():
        (tmp_path / name).write_text(text_of(rows), encoding="utf-8")
    (card,) = load_cards(tmp_path)
    assert card.figures[0].meaning == "tries until the chip refuses" and card.source is None
    assert [step.needs_identity for step in card.problems[0].steps] == [False, True]
    assert list(card.problems[0].contexts) == ["branch", "abroad"]
