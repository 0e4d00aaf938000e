"""Each shipped profile asks for no more than the written conversations hold: 02_synth would end otherwise."""

import pytest

from telco_nb import DATA_DIR
from telco_nb.corpus import dataset, gold, scenarios
from telco_nb.corpus.cards import load_cards
from telco_nb.study.params import PARAMS_DIR, load_study

PROFILES = sorted(path.stem for path in (PARAMS_DIR / "profiles").glob("*.yaml"))


@pytest.fixture(scope="module")
def written():
    """(gold conversations, noisy ones), with their splits."""
    cards, contexts = load_cards(DATA_DIR / "cards"), scenarios.load_contexts(DATA_DIR / "contexts.yaml")
    unseen = load_study("laptop").base["unseen_terms"]
    grid = scenarios.build_scenarios(cards, contexts, unseen)
    return gold.load_gold(DATA_DIR / "conversations", grid), gold.load_noisy(DATA_DIR / "noisy.jsonl", grid)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_samples_of_a_profile_can_be_drawn_from_the_written_conversations_alone(written, profile):
    (rows, noisy), values = written, load_study(profile).base
    seed, longest = values["seed"], values["longest_words"]
    for split in ("train", "val"):
        n = values[f"{split}_conversations"]
        assert len(dataset.sample_split(rows, split, n, seed, longest)) == n or n is None
    tests = {name: [row for row in rows if row["split"] == name] for name in ("test", "unseen")}
    asked = dataset.test_prompts(tests["test"], "test", values["test_prompts"], seed, longest)
    again = [row for row in noisy if row["scenario_id"] in {prompt["scenario_id"] for prompt in asked}]
    for name, own, limit in (("unseen", tests["unseen"], longest), ("noisy", again, None)):
        n = values[f"{name}_prompts"]
        assert len(dataset.test_prompts(own, name, n, seed, limit)) == n or n is None
