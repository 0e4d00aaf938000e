"""The grid is every term with every problem and context, each cell reads sensibly, and the split is by scenario."""

import copy
from collections import Counter, defaultdict

import pytest
import shipped
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from telco_nb import ROOT
from telco_nb.corpus import filters, scenarios

CONTEXTS_PATH = ROOT / "telco_nb" / "data" / "contexts.yaml"
CARDS, CONTEXTS, GRID = shipped.cards(), shipped.contexts(), shipped.grid()
UNSEEN = shipped.PARAMS["unseen_terms"]
SEEN = [card for card in CARDS if card.id not in UNSEEN]


def splits_of(cards, unseen=UNSEEN, contexts=CONTEXTS):
    grid = scenarios.build_scenarios(cards, contexts, [name for name in unseen if name in {c.id for c in cards}])
    return {scenario.scenario_id: scenario.split for scenario in grid}


# --- the grid ----------------------------------------------------------------------------------------


def test_the_grid_is_the_full_factorial_of_1560_scenarios():
    assert len(CARDS) == 52 and len(CONTEXTS) == 3 and {len(card.problems) for card in CARDS} == {10}
    assert len(GRID) == 52 * 10 * 3 == 1560
    cells = {(s.term_id, s.problem_id, s.context) for s in GRID}
    assert len(cells) == len({s.scenario_id for s in GRID}) == 1560


@pytest.mark.parametrize(("key", "each"), [("context", 520), ("term_id", 30)])
def test_every_context_and_every_term_is_met_equally_often(key, each):
    assert set(Counter(getattr(s, key) for s in GRID).values()) == {each}


def test_a_scenario_carries_what_its_card_says_of_it():
    for s in GRID:
        card = shipped.by_id()[s.term_id]
        problem = card.by_problem[s.problem_id]
        assert s.scenario_id == f"{card.id}.{problem.id}.{s.context}"
        assert (s.category, s.kind, s.weight) == (card.category, problem.kind, problem.weight)


def test_every_scenario_has_its_own_reading_with_what_is_said_why_and_what_the_context_changes():
    assert len({s.reading for s in GRID}) == 1560
    for s in GRID:
        problem = shipped.by_id()[s.term_id].by_problem[s.problem_id]
        assert any(f"“{said.rstrip()}”" in s.reading for said in problem.says)
        assert problem.cause.rstrip(".") in s.reading and problem.contexts[s.context].rstrip(".") in s.reading
        assert not set("{}") & set(s.reading) and ".." not in s.reading.split("”")[1]
        assert 20 <= len(s.reading.split()) <= 120


def test_the_three_contexts_of_a_problem_quote_three_phrasings():
    quoted = defaultdict(set)
    for s in GRID:
        quoted[s.term_id, s.problem_id].add(s.reading.split("“")[1].split("”")[0])
    assert {len(found) for found in quoted.values()} == {3}


# --- the split ---------------------------------------------------------------------------------------


def test_the_split_is_1152_144_144_and_120_of_four_terms_of_four_categories():
    assert Counter(s.split for s in GRID) == {"train": 1152, "val": 144, "test": 144, "unseen": 120}
    unseen = {s.term_id: s.category for s in GRID if s.split == "unseen"}
    assert set(unseen) == set(UNSEEN) and len(UNSEEN) == len(set(unseen.values())) == 4
    assert not {s.term_id for s in GRID if s.split != "unseen"} & set(unseen)


def test_of_each_other_term_24_3_3_with_held_out_cells_of_six_problems_and_all_three_contexts():
    own = {card.id: [s for s in GRID if s.term_id == card.id] for card in SEEN}
    for cells in own.values():
        assert Counter(s.split for s in cells) == {"train": 24, "val": 3, "test": 3}
        held = [s for s in cells if s.split != "train"]
        assert len({s.problem_id for s in held}) == 6
        for name in ("val", "test"):
            assert {s.context for s in held if s.split == name} == {context.id for context in CONTEXTS}


def test_every_problem_of_a_term_that_is_not_unseen_stays_in_training():
    trained = {(s.term_id, s.problem_id) for s in GRID if s.split == "train"}
    assert trained == {(card.id, problem.id) for card in SEEN for problem in card.problems}


@given(dropped=st.sets(st.sampled_from([card.id for card in CARDS]), max_size=47))
@settings(max_examples=15, deadline=None)
def test_cards_that_are_left_out_do_not_change_the_split_of_the_rest(dropped):
    rest = [card for card in CARDS if card.id not in dropped]
    if not any(card.id not in UNSEEN for card in rest):
        return
    whole = {s.scenario_id: s.split for s in GRID if s.term_id not in dropped}
    assert splits_of(rest) == splits_of(rest[::-1]) == whole


def test_the_list_of_unseen_terms_changes_the_split_of_those_terms_alone():
    others = splits_of(CARDS, unseen=[])
    assert all(others[s.scenario_id] == s.split for s in GRID if s.split != "unseen")
    assert Counter(others.values()) == {"train": 1248, "val": 156, "test": 156}


def test_keyed_numbers_never_change():
    """Pinned: a change here would silently change every data set."""
    assert scenarios.stable_hash(1, "a") == 15462742709960270297


# --- grids of other sizes ----------------------------------------------------------------------------

ONE = ("usual",)


def contexts_of(names):
    return [context for context in CONTEXTS if context.id in names]


def test_one_context_gives_each_term_8_1_1_of_different_problems():
    splits = splits_of([shipped.cut(card, contexts=ONE) for card in SEEN], contexts=contexts_of(ONE))
    per_term = Counter((name.split(".")[0], split) for name, split in splits.items())
    assert {split: {n for (_, own), n in per_term.items() if own == split} for split in ("train", "val", "test")} == {
        "train": {8}, "val": {1}, "test": {1},
    }  # fmt: skip


def test_one_problem_gives_each_term_one_scenario_of_each_split():
    splits = splits_of([shipped.cut(card, 1) for card in SEEN])
    assert Counter(splits.values()) == {"train": 48, "val": 48, "test": 48}
    assert len({(name.split(".")[0], split) for name, split in splits.items()}) == 144


def test_one_problem_and_one_context_are_split_over_all_terms_together():
    splits = splits_of([shipped.cut(card, 1, ONE) for card in SEEN], contexts=contexts_of(ONE))
    assert Counter(splits.values()) == {"train": 38, "val": 5, "test": 5}


@given(numbers=st.lists(st.integers(1, 10), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_unequal_numbers_of_problems_give_a_full_grid_with_a_tenth_held_out_of_each_term(numbers):
    cards = [shipped.cut(card, n) for card, n in zip(SEEN, numbers, strict=False)]
    splits = splits_of(cards)
    assert len(splits) == 3 * sum(numbers)
    for card, n in zip(cards, numbers, strict=True):
        counts = Counter(split for name, split in splits.items() if name.split(".")[0] == card.id)
        held = max(1, round(0.3 * n))
        assert counts == {"train": 3 * n - 2 * held, "val": held, "test": held}


def test_a_term_too_small_to_give_a_held_out_cell_trains_beside_larger_ones():
    cards = [shipped.cut(SEEN[0], 1, ("usual", "away")), *(shipped.cut(c, 3, ("usual", "away")) for c in SEEN[1:4])]
    splits = splits_of(cards, contexts=contexts_of(("usual", "away")))
    assert {split for name, split in splits.items() if name.startswith(f"{SEEN[0].id}.")} == {"train"}
    assert Counter(splits.values()) == {"train": 14, "val": 3, "test": 3}


def test_too_few_scenarios_are_refused_with_the_fix():
    one = [shipped.cut(CARDS[0], 2, ONE)]
    with pytest.raises(ValueError, match=r"2 scenarios are too few: at least 3 .*Add problems, contexts or cards\."):
        scenarios.build_scenarios(one, contexts_of(ONE), [])


# --- faults, by name ---------------------------------------------------------------------------------


def test_contexts_other_than_the_cards_are_refused_by_name():
    with pytest.raises(ValueError, match=r"has away, usual, but .* have away, depended_on, usual.*contexts_path"):
        scenarios.build_scenarios(CARDS, CONTEXTS[:2], [])


def test_an_unseen_term_without_a_card_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unseen_terms: no card has the id pager, telex\. Set unseen_terms"):
        scenarios.build_scenarios(CARDS, CONTEXTS, ["telex", "puk", "pager"])


def test_keeping_all_terms_out_of_training_is_refused():
    with pytest.raises(ValueError, match=r"all terms are kept out of training\. Leave at least one"):
        scenarios.build_scenarios(CARDS[:2], CONTEXTS, [card.id for card in CARDS[:2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["contexts"].append(copy.deepcopy(raw["contexts"][0])), "must be unique; repeated: usual"),
        (lambda raw: raw["contexts"][1].pop("reading"), r"contexts\.1\.reading: Field required"),
        (lambda raw: raw["contexts"][2].update(id="Two words"), r"contexts\.2\.id"),
        (lambda raw: raw["contexts"][0].update(clauses="none"), r"contexts\.0\.clauses"),
        (lambda raw: raw["contexts"][0].update(mood="calm"), r"contexts\.0\.mood: Extra"),
        (lambda raw: raw.update(contexts=[]), "contexts: List should have at least 1"),
        (lambda raw: raw.pop("contexts"), "contexts: Field required"),
    ],
)
def test_a_faulty_contexts_file_is_refused_naming_file_and_key(tmp_path, change, message):
    raw = yaml.safe_load(CONTEXTS_PATH.read_text(encoding="utf-8"))
    change(raw)
    path = tmp_path / "contexts.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        scenarios.load_contexts(path)
    assert "contexts.yaml" in str(error.value)


@pytest.mark.parametrize("text", ["contexts: [", "- usual", "contexts: {}", "contexts:\n- a\ncontexts:\n- b\n", ""])
def test_a_contexts_file_of_another_shape_is_refused_by_name(tmp_path, text):
    (tmp_path / "contexts.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"contexts\.yaml"):
        scenarios.load_contexts(tmp_path / "contexts.yaml")


# --- rows and tables ---------------------------------------------------------------------------------


def test_a_row_has_the_keys_that_the_filters_ask_for_and_what_its_scenario_holds():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    row = scenarios.conversation_row(GRID[0], 7, "variant", messages, "terse")
    assert tuple(row) == filters.CONVERSATION_KEYS
    assert row["conversation_id"] == f"{GRID[0].scenario_id}.07" and row["n_turns"] == 2
    assert all(row[key] == getattr(GRID[0], key) for key in ("scenario_id", "term_id", "kind", "context", "split"))


def test_the_tables_hold_every_scenario_and_count_each_level_by_split():
    table = scenarios.scenarios_table(GRID)
    assert list(table["scenario_id"]) == [s.scenario_id for s in GRID] and not table.isna().to_numpy().any()
    counts = scenarios.level_counts(table).set_index(["factor", "level"])
    assert list(counts.columns) == list(scenarios.SPLITS)
    assert list(counts.loc[("context", "away")]) == [384, 48, 48, 40]
    for factor in ("category", "kind", "context"):
        assert list(counts.loc[factor].sum()) == [1152, 144, 144, 120]
