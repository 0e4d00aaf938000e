"""The grid is an exact factorial, every cell reads sensibly, and the split is by scenario and balanced."""

from collections import Counter

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from telco_nb import ROOT
from telco_nb.corpus import scenarios
from telco_nb.corpus.cards import load_cards

AXES_PATH = ROOT / "telco_nb" / "data" / "axes.yaml"
CARDS = load_cards(ROOT / "telco_nb" / "data" / "glossary.yaml")
AXES = scenarios.load_axes(AXES_PATH)
GRID = scenarios.build_scenarios(CARDS, AXES, seed=20260605)


def test_the_grid_is_the_full_factorial_of_1560_scenarios():
    assert len(GRID) == 52 * 5 * 3 * 2 == 1560
    cells = {(s.term_id, s.intent, s.situation, s.customer) for s in GRID}
    assert len(cells) == len({s.scenario_id for s in GRID}) == 1560


@pytest.mark.parametrize(("axis", "each"), [("intent", 312), ("situation", 520), ("customer", 780), ("term_id", 30)])
def test_every_level_of_an_axis_is_met_equally_often(axis, each):
    assert set(Counter(getattr(s, axis) for s in GRID).values()) == {each}


@given(seed=st.integers(0, 2**32), n=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_every_term_gives_24_3_3_cells_for_any_seed(seed, n):
    splits = scenarios.split_scenarios([s for s in GRID if s.term_id in {c.id for c in CARDS[:n]}], seed)
    per_term = Counter((scenario_id.split(".")[0], name) for scenario_id, name in splits.items())
    assert {count for (_, name), count in per_term.items() if name == "train"} == {24}
    assert {count for (_, name), count in per_term.items() if name != "train"} == {3}


@pytest.mark.parametrize("name", ["val", "test"])
@pytest.mark.parametrize("seed", [0, 1, 20260605])
def test_held_out_cells_are_balanced_over_intents_situations_and_customers(name, seed):
    held = [s for s in scenarios.build_scenarios(CARDS, AXES, seed) if s.split == name]
    for axis, spread in (("situation", 0), ("customer", 2), ("intent", 2)):
        counts = Counter(getattr(s, axis) for s in held)
        assert set(counts) == set(AXES.ids(axis))
        assert max(counts.values()) - min(counts.values()) <= spread, counts
    pairs = Counter((s.intent, s.situation) for s in held)
    assert len(pairs) == 15 and max(pairs.values()) - min(pairs.values()) <= 2


def test_a_terms_held_out_cells_differ_in_intent_and_situation():
    for name in ("val", "test"):
        for card in CARDS:
            held = [s for s in GRID if s.split == name and s.term_id == card.id]
            assert len({s.intent for s in held}) == len({s.situation for s in held}) == 3


def test_another_seed_gives_another_split_and_the_same_seed_the_same():
    assert scenarios.build_scenarios(CARDS, AXES, 20260605) == GRID
    assert [s.split for s in scenarios.build_scenarios(CARDS, AXES, 7)] != [s.split for s in GRID]


def test_every_cell_has_its_own_reading_with_nothing_left_to_fill():
    readings = [s.reading for s in GRID]
    assert len(set(readings)) == 1560
    assert not any("{" in text or "}" in text for text in readings)
    assert all(30 <= len(text.split()) <= 120 for text in readings)


def test_an_odd_cell_reads_as_the_cards_own_dispute():
    cell = next(s for s in GRID if s.scenario_id == "latency.billing_dispute.first_contact.novice")
    card = next(c for c in CARDS if c.id == "latency")
    assert card.billing_disputes[0] in cell.reading and "disputes a charge" in cell.reading


def test_own_axes_give_their_own_exact_grid(tmp_path):
    raw = yaml.safe_load(AXES_PATH.read_text())
    raw["axes"]["situation"] = raw["axes"]["situation"][:2]
    path = tmp_path / "axes.yaml"
    path.write_text(yaml.safe_dump(raw))
    grid = scenarios.build_scenarios(CARDS[:3], scenarios.load_axes(path), seed=1)
    assert len(grid) == 3 * 5 * 2 * 2
    assert Counter(s.split for s in grid) == {"train": 48, "val": 6, "test": 6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["axes"]["customer"].append(dict(raw["axes"]["customer"][0])), "repeated: novice"),
        (lambda raw: raw["moods"].append("fault"), "repeated: fault"),
        (lambda raw: raw["axes"].pop("intent"), "axes.intent"),
        (lambda raw: raw.update(turn_table=[4]), "turn_table"),
    ],
)
def test_faulty_axes_are_refused_naming_file_and_key(tmp_path, change, message):
    raw = yaml.safe_load(AXES_PATH.read_text())
    change(raw)
    path = tmp_path / "axes.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=message) as error:
        scenarios.load_axes(path)
    assert "axes.yaml" in str(error.value)


def test_keyed_numbers_never_change():
    """Pinned: a change here would silently change every data set."""
    assert scenarios.stable_hash(1, "a") == 15462742709960270297


def smaller(tmp_path, **levels):
    """The study's axes with the first so many levels of each axis."""
    raw = yaml.safe_load(AXES_PATH.read_text())
    for axis, n in levels.items():
        raw["axes"][axis] = raw["axes"][axis][:n]
    path = tmp_path / "axes.yaml"
    path.write_text(yaml.safe_dump(raw))
    return scenarios.load_axes(path)


@pytest.mark.parametrize(("intent", "situation", "cards"), [(3, 2, 4), (4, 3, 7), (5, 3, 2), (2, 3, 25)])
def test_a_small_grid_holds_out_a_tenth_within_two_points_and_every_term(tmp_path, intent, situation, cards):
    grid = scenarios.build_scenarios(CARDS[:cards], smaller(tmp_path, intent=intent, situation=situation), seed=3)
    counts = Counter(s.split for s in grid)
    assert len(grid) == cards * intent * situation * 2
    for name in ("val", "test"):
        assert abs(counts[name] / len(grid) - 0.1) <= 0.02
        assert {s.term_id for s in grid if s.split == name} == {card.id for card in CARDS[:cards]}


def test_a_grid_too_small_to_split_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="6 cells a term; at least 10"):
        scenarios.build_scenarios(CARDS, smaller(tmp_path, intent=3, situation=1), seed=1)
    with pytest.raises(ValueError, match=r"3 val scenarios do not meet every intent \(absent:.*Add cards"):
        scenarios.build_scenarios(CARDS[:1], AXES, seed=1)


def test_wording_with_an_unknown_slot_is_refused_naming_its_levels(tmp_path):
    raw = yaml.safe_load(AXES_PATH.read_text())
    raw["axes"]["intent"][1]["detail"] = "About {colour}."
    path = tmp_path / "axes.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=r"levels fault, first_contact, novice: cannot fill 'colour'"):
        scenarios.build_scenarios(CARDS[:4], scenarios.load_axes(path), seed=1)
