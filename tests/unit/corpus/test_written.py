"""Written conversations and prompts of one's own load as they are, and every fault is named with file and line."""

import dataclasses
import json
import re
from collections import Counter

import pytest
import shipped

from telco_nb import ROOT
from telco_nb.corpus import dataset, filters, gold, scenarios

GRID = shipped.grid()
ONE, TWO = GRID[0].scenario_id, GRID[1].scenario_id
NOISY_PATH = ROOT / shipped.PARAMS["noisy_path"]
BROKEN = "broken \ud800 text"
MESSAGES = [{"role": "user", "content": "no data since noon"}, {"role": "assistant", "content": "Restart the phone."}]


def folder_of(tmp_path, *lines, name="apn.jsonl"):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    return tmp_path


# --- the shipped conversations -----------------------------------------------------------------------


def test_every_scenario_has_one_gold_conversation_in_grid_order():
    rows = shipped.gold_rows()
    assert [row["scenario_id"] for row in rows] == [s.scenario_id for s in GRID] and len(rows) == 1560
    assert all(tuple(row) == filters.CONVERSATION_KEYS and row["origin"] == "gold" for row in rows)
    assert [row["conversation_id"] for row in rows] == [f"{s.scenario_id}.00" for s in GRID]
    assert [row["split"] for row in rows] == [s.split for s in GRID]


def test_no_gold_conversation_is_refused_by_a_filter():
    refused = {
        row["scenario_id"]: filters.reject_reason(row, shipped.by_id()[row["term_id"]]) for row in shipped.gold_rows()
    }
    assert {name: reason for name, reason in refused.items() if reason} == {}


def test_gold_conversations_are_varied_the_agent_asks_and_customers_are_brief():
    [row] = dataset.variety_table(shipped.gold_rows(), seed=1).to_dict("records")
    assert row["origin"] == "gold" and row["conversations"] == 1560
    assert row["same_ending_share"] < 0.02 and row["asks_share"] >= 0.3 and row["short_share"] >= 0.15


def test_the_noisy_exchanges_are_one_of_each_test_scenario_and_pass_the_filters():
    rows = gold.load_noisy(NOISY_PATH, GRID)
    assert Counter(row["scenario_id"] for row in rows) == Counter(s.scenario_id for s in GRID if s.split == "test")
    assert len(rows) == 144 and all(row["conversation_id"] == f"{row['scenario_id']}.noisy" for row in rows)
    refused = {row["scenario_id"]: filters.reject_reason(row, shipped.by_id()[row["term_id"]]) for row in rows}
    assert {name: reason for name, reason in refused.items() if reason} == {}


def test_a_noisy_customer_does_not_repeat_the_gold_conversation_of_the_scenario():
    said = {row["scenario_id"]: row["messages"][0]["content"] for row in shipped.gold_rows()}
    assert all(row["messages"][0]["content"] != said[row["scenario_id"]] for row in gold.load_noisy(NOISY_PATH, GRID))


def test_noisy_lines_of_scenarios_outside_the_test_split_are_left_out():
    moved = [dataclasses.replace(s, split="train") if s.term_id == "apn" else s for s in GRID]
    rows = gold.load_noisy(NOISY_PATH, moved)
    assert len(rows) == 141 and not any(row["term_id"] == "apn" for row in rows)


# --- files of written conversations ------------------------------------------------------------------


def test_without_a_path_there_are_no_rows():
    assert gold.load_gold(None, GRID) == gold.load_noisy(None, GRID) == gold.load_prompts(None, shipped.cards()) == []


def test_a_scenario_may_lack_a_conversation_and_lines_may_stand_in_any_order(tmp_path):
    folder = folder_of(
        tmp_path, {"id": TWO, "messages": MESSAGES * 2, "ends": "solved"}, "", {"id": ONE, "messages": MESSAGES}
    )
    rows = gold.load_gold(folder, GRID)
    assert [(row["scenario_id"], row["n_turns"]) for row in rows] == [(ONE, 1), (TWO, 2)]
    assert rows[0] == scenarios.conversation_row(GRID[0], 0, "gold", MESSAGES)


def test_a_byte_order_mark_windows_line_ends_and_line_separators_inside_a_text_are_read(tmp_path):
    said = "first line\u2028second line\u0085third"
    messages = [{"role": "user", "content": said}, MESSAGES[1]]
    lines = [json.dumps({"id": name, "messages": messages}, ensure_ascii=False) for name in (ONE, TWO)]
    (tmp_path / "apn.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert [row["messages"][0]["content"] for row in gold.load_gold(tmp_path, GRID)] == [said, said]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1]", "line 2"),
        ({"id": TWO}, "line 2: messages: Field required"),
        ({"id": TWO, "messages": MESSAGES[:1]}, "line 2: messages: List should have at least 2"),
        ({"id": TWO, "messages": [MESSAGES[0], {"role": "system", "content": "ok"}]}, r"line 2: messages\.1\.role"),
        ({"id": TWO, "messages": [MESSAGES[0], {"role": "assistant", "content": " "}]}, r"line 2: messages\.1\.cont"),
        ({"id": TWO, "messages": MESSAGES, "mood": "calm"}, "line 2: mood: Extra"),
        ({"id": "apn.no_such.usual", "messages": MESSAGES}, "line 2: no scenario has the id 'apn.no_such.usual'"),
        ({"id": ONE, "messages": MESSAGES}, f"line 2: '{ONE}' is given twice"),
        ({"id": TWO, "messages": MESSAGES[::-1]}, "line 2: .* the roles must go user, assistant in turn"),
        ({"id": TWO, "messages": [*MESSAGES, MESSAGES[0]]}, "line 2: .* the roles must go user, assistant in turn"),
        ({"id": TWO, "messages": [{"role": "user", "content": BROKEN}, MESSAGES[1]]}, "line 2: .*unicode"),
    ],
    ids=range(13),
)  # fmt: skip
def test_a_faulty_line_is_refused_with_file_and_line(tmp_path, line, message):
    folder = folder_of(tmp_path, {"id": ONE, "messages": MESSAGES}, line)
    for load, path in ((gold.load_gold, folder), (gold.load_noisy, folder / "apn.jsonl")):
        with pytest.raises(gold.WrittenFileError, match=rf"apn\.jsonl, {message}"):
            load(path, GRID)


def test_a_scenario_that_two_files_hold_is_refused(tmp_path):
    folder_of(tmp_path, {"id": ONE, "messages": MESSAGES})
    folder_of(tmp_path, {"id": ONE, "messages": MESSAGES}, name="copy.jsonl")
    with pytest.raises(gold.WrittenFileError, match=rf"copy\.jsonl, line 1: '{ONE}' is given twice"):
        gold.load_gold(tmp_path, GRID)


def test_a_missing_folder_or_file_and_bytes_that_are_no_utf_8_are_refused_by_name(tmp_path):
    with pytest.raises(gold.WrittenFileError, match=r"none: no such folder\. Set gold_path to null"):
        gold.load_gold(tmp_path / "none", GRID)
    with pytest.raises(gold.WrittenFileError, match=r"none\.jsonl"):
        gold.load_noisy(tmp_path / "none.jsonl", GRID)
    (tmp_path / "old.jsonl").write_bytes('{"id": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(gold.WrittenFileError, match=r"old\.jsonl, line 1: .*not a text in UTF-8"):
        gold.load_gold(tmp_path, GRID)


# --- prompts of one's own ----------------------------------------------------------------------------

PUK = "My phone asks for a PUK, what is that?"


def own(tmp_path, text, name="own.csv"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return gold.load_prompts(tmp_path / name, shipped.cards())


def test_a_row_has_the_keys_of_the_other_prompts(tmp_path):
    [row] = own(tmp_path, f'prompt,reference,term,problem\n"{PUK}",Stop typing.,puk,need_puk\n')
    shipped_row = dataset.test_prompts(shipped.gold_rows()[:3], "test", 1, seed=1)[0]
    assert set(row) == set(shipped_row) and row["test_set"] == "own"
    assert row["messages"] == [{"role": "user", "content": PUK}] and row["reference"] == "Stop typing."
    assert (row["term_id"], row["problem_id"]) == ("puk", "need_puk")


def test_prompt_alone_is_enough_and_the_one_card_that_it_mentions_is_its_term(tmp_path):
    rows = own(tmp_path, f'prompt\n"{PUK}"\nnothing works today\n"no PUK, and the voicemail is full"\nmy pukka phone\n')
    assert [row["term_id"] for row in rows] == ["puk", "", "", ""]
    assert all(row["problem_id"] == row["reference"] == "" for row in rows)
    assert len({row["prompt_id"] for row in rows}) == 4


def test_a_term_that_is_given_wins_over_the_one_that_is_mentioned(tmp_path):
    [row] = own(tmp_path, f'prompt,term\n"{PUK}",sim_pin\n')
    assert row["term_id"] == "sim_pin"


def test_a_spreadsheets_byte_order_mark_semicolons_and_quoted_line_breaks_are_read(tmp_path):
    rows = own(tmp_path, 'prompt;reference\r\n"line one\nline ""two"" — café";ok then\r\n'.encode("utf-8-sig"))
    assert rows[0]["messages"][0]["content"] == 'line one\nline "two" — café' and rows[0]["reference"] == "ok then"


def test_jsonl_gives_the_same_rows_as_csv(tmp_path):
    line = json.dumps({"prompt": PUK, "reference": None, "term": "puk"})
    [row] = own(tmp_path, f"\ufeff{line}\n\n", "own.jsonl")
    [other] = own(tmp_path, f'prompt,reference,term\n"{PUK}",,puk\n')
    assert {**row, "prompt_id": 0, "scenario_id": 0} == {**other, "prompt_id": 0, "scenario_id": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": PUK, "answer": "x"}, r"unknown column answer\. Columns: prompt, reference, term, problem"),
        ({"prompt": " "}, "prompt is empty.*only prompt is needed"),
        ({"term": "puk"}, "prompt is empty"),
        ({"prompt": PUK, "term": "telex"}, "no card has the id 'telex'"),
        ({"prompt": PUK, "term": "puk", "problem": "telex"}, "card 'puk' has no problem 'telex'"),
        ({"prompt": "it is broken", "problem": "need_puk"}, "card '' has no problem 'need_puk'"),
    ],
)
def test_a_faulty_row_is_refused_with_its_number(tmp_path, row, message):
    with pytest.raises(gold.WrittenFileError, match=rf"own\.jsonl, row 2: {message}"):
        own(tmp_path, json.dumps({"prompt": "fine"}) + "\n" + json.dumps(row), "own.jsonl")


def test_a_faulty_row_of_a_table_is_refused_with_the_number_that_a_spreadsheet_shows(tmp_path):
    for text, message in {
        "prompt,term\nfine,\nnot fine,telex\n": "row 3: no card has the id 'telex'",
        "prompt,term\nfine,\n,puk\n": "row 3: prompt is empty",
        "prompt,answer\nfine,x\n": "row 2: unknown column answer",
        "term\npuk\n": "row 2: prompt is empty",
    }.items():
        with pytest.raises(gold.WrittenFileError, match=rf"own\.csv, {message}"):
            own(tmp_path, text)


def test_what_a_table_reader_refuses_is_refused_as_a_file_of_prompts(tmp_path):
    with pytest.raises(gold.WrittenFileError, match=r"own\.csv"):
        own(tmp_path, b"prompt\ncaf\xe9\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", r"own\.jsonl, line 1: not JSON"),
        ("[1]", r"own\.jsonl, line 1: an object is expected"),
        ('{"prompt": ["a"]}', r"own\.jsonl, row 1: prompt is not a text"),
        ('{"prompt": "a b", "term": 7}', r"own\.jsonl, row 1: term is not a text"),
        ('{"prompt": "\\ud800 b"}', r"own\.jsonl, line 1: prompt: the text holds half a character"),
    ],
)
def test_a_jsonl_line_of_another_shape_is_refused(tmp_path, text, message):
    with pytest.raises(gold.WrittenFileError, match=message):
        own(tmp_path, text, "own.jsonl")


@pytest.mark.parametrize("name", ["none.csv", "none.jsonl"])
def test_a_missing_file_of_prompts_is_refused_by_name(tmp_path, name):
    with pytest.raises(gold.WrittenFileError, match=re.escape(name)):
        gold.load_prompts(tmp_path / name, shipped.cards())


def test_own_prompts_can_be_written_beside_the_others(tmp_path):
    rows = dataset.test_prompts(shipped.gold_rows()[:9], "test", None, seed=1) + own(tmp_path, "prompt\nhello there\n")
    dataset.write_parquet(rows, tmp_path / "prompts.parquet")
    assert (tmp_path / "prompts.parquet").stat().st_size > 0
