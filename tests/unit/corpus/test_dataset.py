"""Filters count what they refuse; samples are gold first and balanced; splits share nothing."""

import copy
import json
import re
from collections import Counter, defaultdict
from itertools import combinations

import pyarrow.parquet as pq
import pytest
import shipped
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from telco_nb import ROOT
from telco_nb.corpus import cards, choices, dataset, duplicates, filters, gold, scenarios, variants
from telco_nb.lora import packing
from telco_nb.lora.base_model import PACKAGED_MODEL, load_tokenizer
from telco_nb.study.params import load_study

GRID, GOLD = shipped.grid(), shipped.gold_rows()
BANKING = ROOT / "tests" / "unit" / "corpus" / "data"


@pytest.fixture(scope="module")
def filtered():
    return shipped.filtered()


@pytest.fixture(scope="module")
def kept(filtered):
    return filtered[0]


@pytest.fixture(scope="module")
def leaks(kept):
    return dataset.count_leaks(kept)


def test_the_figures_of_the_blind_reading_are_shown_for_the_shipped_conversations_only():
    note = dataset.blind_reading_note(dataset.SHIPPED_GOLD, dataset.SHIPPED_REVIEWS)
    assert all(f"{figure}" in note for figure in dataset.BLIND_READING.values())
    for paths in (("own", dataset.SHIPPED_REVIEWS), (dataset.SHIPPED_GOLD, "own"), (None, None)):
        assert dataset.blind_reading_note(*paths) == ""
    values = yaml.safe_load((ROOT / "params" / "base.yaml").read_text())
    assert (values["gold_path"], values["reviews_path"]) == (dataset.SHIPPED_GOLD, dataset.SHIPPED_REVIEWS)


# --- the filters on the whole data set ---------------------------------------------------------------


def test_counters_add_up_and_name_every_filter(filtered):
    kept, rejects, refused = filtered
    assert sum(refused.values()) == len(rejects) == 31200 - len(kept)
    assert tuple(refused) == dataset.REASONS and set(filters.FILTERS) < set(refused)


def test_all_gold_is_kept_and_no_variant_is_refused_for_what_it_says_itself(filtered):
    kept, _, refused = filtered
    assert [row for row in kept if row["origin"] == "gold"] == GOLD
    assert all(refused[name] == 0 for name in filters.FILTERS)
    assert len(kept) > 0.6 * 31200


def test_every_reject_keeps_its_reason_the_row_it_repeats_and_the_row_itself(filtered):
    _, rejects, _ = filtered
    by_id = {row["conversation_id"]: row for row in GOLD + shipped.variant_rows()}
    assert set(rejects["reason"]) <= set(dataset.REASONS)
    for row in rejects.itertuples():
        assert json.loads(row.conversation) == by_id[row.conversation_id]
        assert row.detail.split()[0] in by_id


# --- which of two duplicates goes --------------------------------------------------------------------


def a_row(name, split="train", origin="variant", **messages):
    """A gold conversation of `puk`, with a split, an origin and texts of one's choice."""
    row = copy.deepcopy(next(row for row in GOLD if row["term_id"] == "puk"))
    for message, text in zip(row["messages"], (messages.get("user"), messages.get("agent")), strict=False):
        message["content"] = text or message["content"]
    return row | {"conversation_id": name, "split": split, "origin": origin}


@pytest.mark.parametrize(
    ("stays", "goes"),
    [
        (("test", "variant"), ("train", "variant")),
        (("unseen", "variant"), ("test", "variant")),
        (("test", "variant"), ("val", "variant")),
        (("train", "gold"), ("test", "variant")),
        (("train", "gold"), ("train", "variant")),
        (("val", "gold"), ("train", "gold")),
    ],
)
def test_gold_stays_before_variants_and_held_out_rows_before_training(stays, goes):
    first, second = a_row("goes", *goes), a_row("stays", *stays)
    for rows in ([first, second], [second, first]):
        found, rejects, refused = dataset.apply_filters(rows, shipped.cards())
        assert [row["conversation_id"] for row in found] == ["stays"]
        assert refused["exact_duplicate_first_turn"] == 1 and rejects.iloc[0]["detail"] == "stays"


def test_an_equal_answer_is_a_duplicate_too_and_case_and_stops_do_not_count():
    one, two = a_row("one", "test", user="my PUK is lost"), a_row("two", user="where does the PUK code stand, please?")
    two["messages"][1]["content"] = two["messages"][1]["content"].upper().replace(".", "!")
    found, _, refused = dataset.apply_filters([two, one], shipped.cards())
    assert found == [one] and refused["exact_duplicate_answer"] == 1


def test_a_text_that_differs_in_one_word_is_a_near_duplicate():
    said = next(row for row in GOLD if row["term_id"] == "puk")["messages"][0]["content"]
    one, two = a_row("one"), a_row("two", user=f"{said} Hello", agent="The PUK is printed on the holder of the card.")
    _, rejects, refused = dataset.apply_filters([one, two], shipped.cards())
    assert refused["near_duplicate_first_turn"] == 1 and rejects.iloc[0]["detail"].startswith("one (0.9")


def test_two_exchanges_with_the_same_words_in_two_splits_lose_the_training_row():
    test_row = next(row for row in GOLD if row["term_id"] == "puk" and row["split"] == "test")
    twin = copy.deepcopy(test_row) | {"split": "train", "origin": "variant", "conversation_id": "twin"}
    for message in twin["messages"]:
        message["content"] = " ".join(reversed(message["content"].split()))  # no shingle in common
    others = [row for row in GOLD if row["term_id"] == "puk" and row is not test_row]
    found, _, refused = dataset.apply_filters([*others, twin, test_row], shipped.cards())
    assert refused["similar_across_splits"] == 1
    assert test_row in found and "twin" not in {row["conversation_id"] for row in found}


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


# --- the splits share nothing ------------------------------------------------------------------------


def test_nothing_is_shared_between_the_splits_and_all_gates_pass(kept, leaks):
    assert set(leaks.values()) == {0} and len(leaks) == 6
    gates = dataset.leak_gates(kept, leaks, GRID)
    assert len(gates) == 9 and gates["passed"].all(), gates


def test_every_scenario_keeps_a_conversation_and_every_split_its_contexts(kept):
    assert {row["scenario_id"] for row in kept} == {s.scenario_id for s in GRID}
    assert {(row["context"], row["split"]) for row in kept} == {(s.context, s.split) for s in GRID}


def test_a_leak_is_found_and_fails_its_gate():
    test_row = next(row for row in GOLD if row["split"] == "test")
    found = dataset.count_leaks([*GOLD, test_row | {"split": "train"}])
    assert min(found[name] for name in ("shared_scenarios", "exact_first_turn", "near_answer", "similar_exchange")) > 0
    gates = dataset.leak_gates(GOLD, found, GRID)
    assert (~gates["passed"]).sum() == 6 and not gates["passed"][:6].any()


@pytest.mark.parametrize(
    ("gate", "left_out"),
    [
        ("contexts absent from a split", lambda row: (row["split"], row["context"]) == ("val", "away")),
        ("scenarios without any conversation", lambda row: row["scenario_id"] == GRID[5].scenario_id),
        (
            "points between a split and its share",
            lambda row: row["split"] == "train" and row["kind"] in ("fault", "charge", "change"),
        ),
    ],
)
def test_a_split_without_what_it_should_have_fails_its_gate(gate, left_out):
    gates = dataset.leak_gates([row for row in GOLD if not left_out(row)], {}, GRID).set_index("gate")
    [name] = [name for name in gates.index if name.startswith(gate)]
    assert gates.loc[name, "value"] >= 1 and not gates.loc[name, "passed"]


def test_by_hand_no_text_and_no_scenario_is_shared_between_splits(kept):
    """The claim of the gates, checked with nothing of theirs: every pair of texts of two splits of a term."""
    scenario_splits = defaultdict(set)
    for row in kept:
        scenario_splits[row["scenario_id"]].add(row["split"])
    assert {len(found) for found in scenario_splits.values()} == {1}
    terms = {card.id for card in shipped.cards()[::8]}
    for turn in (0, 1):
        by_term = defaultdict(list)
        for row in kept:
            if row["term_id"] in terms:
                tokens = [word.strip(".,;:?!…“”\"'()") for word in row["messages"][turn]["content"].lower().split()]
                by_term[row["term_id"]].append(
                    (row["split"], {tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)})
                )
        for rows in by_term.values():
            for (split_a, a), (split_b, b) in combinations(rows, 2):
                assert split_a == split_b or not a or not b or len(a & b) < 0.8 * len(a | b)


# --- samples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [9, 48, 100, 500, 1152])
def test_a_sample_is_gold_first_and_balanced_over_terms_and_contexts(kept, n):
    rows = dataset.sample_split(kept, "train", n, seed=1)
    assert len({row["conversation_id"] for row in rows}) == n and {row["origin"] for row in rows} == {"gold"}
    for key, levels in (("term_id", 48), ("context", 3)):
        counts = Counter(row[key] for row in rows)
        assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == min(n, levels)
    assert len({row["kind"] for row in rows}) == 7


def test_variants_follow_when_the_gold_is_used_up_one_of_each_scenario_at_a_time(kept):
    rows = dataset.sample_split(kept, "train", 1152 + 480, seed=1)
    assert {row["origin"] for row in rows[:1152]} == {"gold"} and {row["origin"] for row in rows[1152:]} == {"variant"}
    later = rows[1152:]
    assert set(Counter(row["term_id"] for row in later).values()) == {10}
    assert max(Counter(row["scenario_id"] for row in later).values()) == 1


@given(small=st.integers(0, 144), large=st.integers(0, 144), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_larger_sample_begins_with_the_smaller_one(small, large, seed):
    small, large = sorted((small, large))
    larger = dataset.sample_split(GOLD, "val", large, seed)
    assert larger[:small] == dataset.sample_split(GOLD, "val", small, seed)


def test_another_seed_takes_other_rows_and_the_order_of_the_rows_does_not_matter():
    def ids(rows, seed):
        return [row["conversation_id"] for row in dataset.sample_split(rows, "train", 100, seed)]

    assert ids(GOLD, 1) == ids(GOLD[::-1], 1) and len(set(ids(GOLD, 1)) & set(ids(GOLD, 2))) < 60


def test_null_means_the_whole_split_and_too_many_is_refused_with_both_numbers():
    whole = dataset.sample_split(GOLD, "val", None, seed=1)
    assert sorted(r["conversation_id"] for r in whole) == sorted(
        r["conversation_id"] for r in GOLD if r["split"] == "val"
    )
    with pytest.raises(ValueError, match="145 conversations requested from split 'val', which has 144"):
        dataset.sample_split(GOLD, "val", 145, seed=1)


def held_out_samples(kept, n_test=24, n_val=16):
    tested = dataset.test_prompts([row for row in kept if row["split"] == "test"], "test", n_test, seed=1)
    return tested + dataset.sample_split(dataset.validation_rows(kept), "val", n_val, seed=1)


def problem(row):
    return row["term_id"], row["problem_id"]


@pytest.mark.parametrize("n", [48, 64, 80, 300, 1152])
def test_a_small_training_sample_teaches_the_problems_that_are_asked_as_the_whole_one_does(kept, n):
    """Each held-out problem stands in training in two other contexts; a sample of any problems had 1 in 8 of them."""
    asked = held_out_samples(kept)
    wanted = {problem(row) for row in asked}
    rows = dataset.sample_split(kept, "train", n, seed=1, asked=asked)
    assert len(wanted) == 40 and {row["origin"] for row in rows} == {"gold"}
    times = Counter(problem(row) for row in rows if problem(row) in wanted)
    assert set(times) == wanted and set(times.values()) <= {1, 2}
    assert sum(times.values()) == min(n, 80)
    assert not {row["scenario_id"] for row in rows} & {row["scenario_id"] for row in asked}
    assert dataset.trained_problems(rows, asked) == (40, 40)
    assert rows == dataset.sample_split(kept, "train", 1152, seed=1, asked=asked)[:n]


def test_asked_problems_come_first_among_variants_too_but_never_before_gold(kept):
    asked = held_out_samples(kept)
    wanted = {problem(row) for row in asked}
    rows = dataset.sample_split(kept, "train", 1152 + 80, seed=1, asked=asked)
    assert {row["origin"] for row in rows[:1152]} == {"gold"}
    assert {problem(row) for row in rows[1152:]} == wanted and {row["origin"] for row in rows[1152:]} == {"variant"}


def test_problems_that_no_context_of_training_has_are_counted_as_not_taught(kept):
    unseen = dataset.test_prompts([row for row in kept if row["split"] == "unseen"], "unseen", 12, seed=1)
    train = dataset.sample_split(kept, "train", None, seed=1)
    assert dataset.trained_problems(train, unseen) == (12, 0)
    assert dataset.trained_problems(train, held_out_samples(kept, 144, 144)) == (288, 288)


def test_conversations_can_be_cut_after_their_first_exchanges():
    whole = [row for row in GOLD if len(row["messages"]) >= 4][:5]
    cut = dataset.first_exchanges(whole, 1)
    assert [row["messages"] for row in cut] == [row["messages"][:2] for row in whole]
    assert [row["messages"][-1]["role"] for row in cut] == ["assistant"] * 5
    assert dataset.first_exchanges(whole, None) == whole == dataset.first_exchanges(whole, 9)


def test_validation_takes_gold_alone_where_there_is_any(kept):
    assert dataset.validation_rows(kept) == [row for row in GOLD if row["split"] == "val"]
    variants_only = [row for row in kept if row["origin"] != "gold"]
    assert dataset.validation_rows(variants_only) == [row for row in variants_only if row["split"] == "val"]


# --- prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("test_set", "n"), [("test", 144), ("unseen", 120)])
def test_there_is_one_prompt_per_scenario_with_the_gold_answer_as_reference(kept, test_set, n):
    prompts = dataset.test_prompts([row for row in kept if row["split"] == test_set], test_set, None, seed=1)
    assert Counter(p["scenario_id"] for p in prompts) == Counter(s.scenario_id for s in GRID if s.split == test_set)
    assert len(prompts) == n and {p["test_set"] for p in prompts} == {test_set}
    by_id = {row["conversation_id"]: row for row in GOLD}
    for prompt in prompts:
        source = by_id[prompt["prompt_id"]]
        assert prompt["messages"] == source["messages"][:1] and prompt["messages"][0]["role"] == "user"
        assert prompt["reference"] == source["messages"][1]["content"]
        assert all(prompt[key] == source[key] for key in ("term_id", "problem_id", "kind", "context"))


def test_without_gold_a_prompt_is_drawn_from_the_variants_of_its_scenario(kept):
    rows = [row for row in kept if row["split"] == "test" and row["origin"] != "gold"]
    prompts = dataset.test_prompts(rows, "test", None, seed=1)
    assert {p["scenario_id"] for p in prompts} == {row["scenario_id"] for row in rows}
    assert {p["prompt_id"] for p in prompts} <= {row["conversation_id"] for row in rows}
    assert prompts == dataset.test_prompts(rows, "test", None, seed=1)


def test_fewer_prompts_are_a_balanced_part_of_all_and_too_many_are_refused():
    rows = [row for row in GOLD if row["split"] == "test"]
    every = dataset.test_prompts(rows, "test", None, seed=1)
    some = dataset.test_prompts(rows, "test", 48, seed=1)
    assert some == every[:48] and len({p["term_id"] for p in some}) == 48
    assert max(Counter(p["context"] for p in some).values()) == 16
    with pytest.raises(ValueError, match="145 prompts requested from test set 'test', which has 144"):
        dataset.test_prompts(rows, "test", 145, seed=1)


# --- tables and files --------------------------------------------------------------------------------


def test_words_by_role_are_counted_for_every_message():
    rows = [a_row("x", user="one two three", agent="a b c d e")]
    rows[0]["messages"] = rows[0]["messages"][:2]
    turns = dataset.turns_table(rows)
    assert turns[["role", "turn", "words"]].to_numpy().tolist() == [["user", 0, 3], ["assistant", 0, 5]]
    stats = dataset.length_stats(dataset.turns_table(rows * 3))
    assert stats["assistant"] == {"mean": 5.0, "median": 5.0, "min": 5, "p05": 5.0, "p95": 5.0, "max": 5}


def test_levels_are_counted_by_split():
    counts = dataset.level_counts(GOLD)
    assert set(counts) == {"kind", "context", "origin", "manner", "n_turns"}
    assert counts["context"]["away"] == {"train": 384, "val": 48, "test": 48, "unseen": 40}
    assert counts["origin"] == {"gold": {"train": 1152, "val": 144, "test": 144, "unseen": 120}}
    assert sum(sum(level.values()) for level in counts["n_turns"].values()) == 1560


def test_parquet_gives_back_the_rows_with_messages_as_structs(tmp_path):
    rows = GOLD[:5]
    dataset.write_parquet(rows, tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == rows
    dataset.write_parquet(rows, tmp_path / "again.parquet")
    assert (tmp_path / "rows.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()


def test_anybody_can_load_the_parquet_files_with_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # else it tells a counter that files were read
    splits = {name: [row for row in GOLD if row["split"] == name] for name in scenarios.SPLITS}
    for name, rows in splits.items():
        dataset.write_parquet(rows, tmp_path / f"{name}.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in splits}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {name: loaded[name].to_list() for name in splits} == splits
    loaded.save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved")["val"][0] == splits["val"][0]


def test_another_domains_glossary_gives_its_own_data_set():
    """From the cards to samples, as 01_glossary and 02_synth go: nothing in the code is about telecom."""
    own, contexts = cards.load_cards(BANKING / "banking"), scenarios.load_contexts(BANKING / "banking_contexts.yaml")
    grid = scenarios.build_scenarios(own, contexts, [])
    asked = list(variants.write_variants(own, grid, contexts, range(8)))
    found, _, refused = dataset.apply_filters(asked, own)
    assert len(asked) == 8 * len(grid) and all(refused[name] == 0 for name in filters.FILTERS)
    assert set(dataset.count_leaks(found).values()) == {0}
    assert len(dataset.sample_split(found, "train", 5, seed=1)) == 5
    held = {s.scenario_id for s in grid if s.split == "test"}
    prompts = dataset.test_prompts([row for row in found if row["split"] == "test"], "test", None, seed=1)
    assert held and {p["scenario_id"] for p in prompts} <= held
    assert not re.search(r"\b(?:SIM|network|router|broadband|phone number)\b", json.dumps(found))


@pytest.mark.parametrize("profile", sorted(path.stem for path in (ROOT / "params" / "profiles").glob("*.yaml")))
def test_a_profile_teaches_all_problems_it_asks_about_and_asks_for_no_more_than_is_written(kept, profile):
    """02_synth would end otherwise. Variants fill up what is missing, but no profile shall need them for a sample."""
    values, rows = load_study(profile).base, [row for row in kept if row["origin"] == "gold"]
    assert values["unseen_terms"] == shipped.PARAMS["unseen_terms"]
    seed, n_train = values["seed"], values["train_conversations"]
    held_out = {name: [row for row in rows if row["split"] == name] for name in ("test", "unseen")}
    asked = dataset.test_prompts(held_out["test"], "test", values["test_prompts"], seed)
    val = dataset.sample_split(dataset.validation_rows(rows), "val", values["val_conversations"], seed)
    train = dataset.sample_split(rows, "train", n_train, seed, asked=[*asked, *val])
    assert len(val) == (values["val_conversations"] or 144) and len(train) == (n_train or 1152)
    assert dataset.trained_problems(train, [*asked, *val]) == (len(asked) + len(val),) * 2
    noisy = gold.load_noisy(ROOT / values["noisy_path"], GRID)
    again = [row for row in noisy if row["scenario_id"] in {prompt["scenario_id"] for prompt in asked}]
    for name, own in (("unseen", held_out["unseen"]), ("noisy", again)):
        n = values[f"{name}_prompts"]
        assert len(dataset.test_prompts(own, name, n, seed)) == n or n is None
    assert len(choices.choice_items(shipped.cards(), GOLD, values["choice_items"])) == values["choice_items"]


@pytest.mark.parametrize("profile", sorted(path.stem for path in (ROOT / "params" / "profiles").glob("*.yaml")))
def test_what_a_profile_trains_on_fits_into_its_max_length(kept, profile):
    """03_train would end otherwise, after 01 and 02. By the tokenizer of the packaged model, finer than Qwen's."""
    values, tokenizer = load_study(profile).base, load_tokenizer(PACKAGED_MODEL)
    for row in dataset.first_exchanges([row for row in kept if row["origin"] == "gold"], values["max_exchanges"]):
        packing.encode_conversation(tokenizer, row["messages"], row["conversation_id"], values["max_length"])
