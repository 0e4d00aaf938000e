"""Filters refuse what they should and count it; samples are balanced; splits share nothing."""

import copy
import json
import re
from collections import Counter, defaultdict
from itertools import combinations

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telco_nb import ROOT
from telco_nb.corpus import cards, dataset, duplicates, filters, scenarios, variants

CARDS = cards.load_cards(ROOT / "telco_nb" / "data" / "glossary.yaml")
AXES = scenarios.load_axes(ROOT / "telco_nb" / "data" / "axes.yaml")
TERMS = CARDS[::6]
GRID = scenarios.build_scenarios(TERMS, AXES, seed=20260605)
ASKED = list(variants.generate_conversations(TERMS, GRID, AXES, 6, seed=5))
KEPT, REJECTS, REFUSED = dataset.apply_filters(ASKED, TERMS)


def test_counters_add_up_and_name_every_filter():
    assert sum(REFUSED.values()) == len(REJECTS) == len(ASKED) - len(KEPT)
    assert tuple(REFUSED) == dataset.REASONS and set(filters.FILTERS) < set(REFUSED)
    assert len(KEPT) > 0.9 * len(ASKED)


def test_every_reject_keeps_its_reason_and_the_row_itself():
    by_id = {c["conversation_id"]: c for c in ASKED}
    assert len(REJECTS) and set(REJECTS["reason"]) <= set(dataset.REASONS)
    for row in REJECTS.itertuples():
        assert json.loads(row.conversation) == by_id[row.conversation_id] and row.detail


def test_of_two_duplicates_the_training_row_goes():
    test_row = next(c for c in KEPT if c["split"] == "test")
    twin = copy.deepcopy(next(c for c in KEPT if c["split"] == "train" and c["term_id"] == test_row["term_id"]))
    twin["messages"][0]["content"] = test_row["messages"][0]["content"].upper()
    kept, rejects, refused = dataset.apply_filters([twin, test_row], TERMS)
    assert kept == [test_row] and refused["exact_duplicate_first_turn"] == 1
    assert rejects.iloc[0]["detail"] == test_row["conversation_id"]


def test_two_exchanges_with_the_same_words_in_two_splits_lose_the_training_row():
    one_word = {card.id for card in TERMS if " " not in card.term}
    test_row = next(c for c in KEPT if c["split"] == "test" and c["term_id"] in one_word)
    twin = copy.deepcopy(test_row) | {"split": "train", "conversation_id": "twin"}
    for message in twin["messages"]:
        message["content"] = " ".join(reversed(message["content"].split()))  # no shingle in common
    others = [c for c in KEPT if c["term_id"] == test_row["term_id"] and c is not test_row]
    kept, _, refused = dataset.apply_filters([*others, test_row, twin], TERMS)
    assert refused["similar_across_splits"] >= 1
    assert "twin" not in {c["conversation_id"] for c in kept} and test_row in kept


def test_nothing_is_shared_between_splits():
    found = dataset.count_leaks(KEPT)
    assert set(found.values()) == {0} and len(found) == 6
    assert dataset.leak_gates(KEPT, found)["passed"].all()


def test_a_leak_is_found_and_fails_its_gate():
    test_row = next(c for c in KEPT if c["split"] == "test")
    found = dataset.count_leaks([*KEPT, test_row | {"split": "train"}])
    assert min(found[name] for name in ("shared_scenarios", "exact_first_turn", "near_answer", "similar_exchange")) > 0
    assert not dataset.leak_gates(KEPT, found)["passed"].all()


def test_a_split_without_one_intent_fails_its_gate():
    rows = [c for c in KEPT if c["split"] != "val" or c["intent"] != "fault"]
    gates = dataset.leak_gates(rows, {}).set_index("gate")
    assert gates.loc["levels or terms absent from a split", "value"] >= 1


def shingles(text):
    """Word 5-shingles by hand, not by the code under test; a shorter text is one shingle."""
    tokens = text.split()
    return {tuple(tokens[i : i + 5]) for i in range(max(1, len(tokens) - 4))}


words = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g"]), min_size=1, max_size=18).map(" ".join)


@given(texts=st.lists(words, min_size=2, max_size=14), threshold=st.sampled_from([0.3, 0.5, 0.8, 1.0]))
@settings(max_examples=200, deadline=None)
def test_near_duplicates_finds_exactly_what_comparing_all_pairs_finds(texts, threshold):
    sets = [shingles(text) for text in texts]
    expected = [
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold
    ]
    assert [(i, j) for i, j, _ in duplicates.near_duplicates(texts, threshold)] == expected


@given(texts=st.lists(words, min_size=2, max_size=14), threshold=st.sampled_from([0.3, 0.5, 0.8, 1.0]))
@settings(max_examples=200, deadline=None)
def test_who_yields_is_what_going_through_the_texts_one_by_one_gives(texts, threshold):
    sets, stay, expected = [shingles(text) for text in texts], [], {}
    for i, own in enumerate(sets):
        near = [j for j in stay if len(own & sets[j]) / len(own | sets[j]) >= threshold]
        if near:
            expected[i] = near[0]
        else:
            stay.append(i)
    assert {i: j for i, (j, _) in duplicates.near_duplicates_to_drop(texts, threshold).items()} == expected


@pytest.mark.parametrize("n", [9, 20, 45, 90])
def test_a_sample_is_balanced_over_terms_and_intents(n):
    rows = dataset.sample_split(KEPT, "train", n, seed=1)
    assert len({row["conversation_id"] for row in rows}) == n
    for key, levels in (("term_id", len(TERMS)), ("intent", 5)):
        counts = Counter(row[key] for row in rows)
        assert max(counts.values()) <= n / levels + 1 and len(counts) == min(n, levels)


def test_a_larger_sample_contains_the_smaller_one():
    assert dataset.sample_split(KEPT, "val", 30, seed=1)[:12] == dataset.sample_split(KEPT, "val", 12, seed=1)


def test_null_means_the_whole_split_and_too_many_is_refused():
    whole = dataset.sample_split(KEPT, "val", None, seed=1)
    assert whole == [c for c in KEPT if c["split"] == "val"]
    with pytest.raises(ValueError, match="which has"):
        dataset.sample_split(KEPT, "val", len(whole) + 1, seed=1)


def test_there_is_one_prompt_per_test_scenario_with_the_given_answer_as_reference():
    prompts = dataset.test_prompts(KEPT, None, seed=1)
    assert Counter(p["scenario_id"] for p in prompts) == Counter(s.scenario_id for s in GRID if s.split == "test")
    by_id = {c["conversation_id"]: c for c in KEPT}
    for prompt in prompts:
        source = by_id[prompt["prompt_id"]]
        assert source["split"] == "test"
        assert prompt["messages"] == source["messages"][:1] and prompt["messages"][-1]["role"] == "user"
        assert prompt["reference"] == source["messages"][1]["content"]


def test_fewer_prompts_are_a_balanced_part_of_all():
    some = dataset.test_prompts(KEPT, 10, seed=1)
    every = {p["prompt_id"] for p in dataset.test_prompts(KEPT, None, seed=1)}
    assert {p["prompt_id"] for p in some} < every
    assert max(Counter(p["intent"] for p in some).values()) <= 3


def test_parquet_gives_back_the_rows_with_messages_as_structs(tmp_path):
    rows = KEPT[:5]
    dataset.write_parquet(rows, tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == rows
    dataset.write_parquet(rows, tmp_path / "again.parquet")
    assert (tmp_path / "rows.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()


def test_anybody_can_load_the_parquet_files_with_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    splits = {name: [c for c in KEPT if c["split"] == name] for name in ("train", "val", "test")}
    for name, rows in splits.items():
        dataset.write_parquet(rows, tmp_path / f"{name}.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in splits}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {name: loaded[name].to_list() for name in splits} == splits
    loaded.save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved")["val"][0] == splits["val"][0]


def test_by_hand_no_text_and_no_scenario_is_shared_between_splits():
    """The claim of the gates, checked with nothing of theirs: every pair of texts of two splits, by brute force."""
    rank = {"test": 0, "val": 1, "train": 2}
    scenario_splits = defaultdict(set)
    for c in KEPT:
        scenario_splits[c["scenario_id"]].add(c["split"])
    assert {len(found) for found in scenario_splits.values()} == {1}
    for turn in (0, 1):
        by_term = defaultdict(list)
        for c in KEPT:
            tokens = re.findall(r"\w+", c["messages"][turn]["content"].lower())
            by_term[c["term_id"]].append(
                (rank[c["split"]], {" ".join(tokens[i : i + 5]) for i in range(len(tokens) - 4)})
            )
        for rows in by_term.values():
            for (rank_a, a), (rank_b, b) in combinations(rows, 2):
                assert rank_a == rank_b or len(a & b) < 0.8 * len(a | b)
