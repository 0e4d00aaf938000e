"""The model card holds a configuration against the bar as 06_analysis does: the same judges, gates and seed."""

import fake_study
import numpy as np
import pandas as pd

from telco_nb.commands.model_card import held_against_bar
from telco_nb.commands.trained import Trained


def of(root, config: str) -> Trained:
    """A configuration of a study with a training seed of its own: nothing but its place counts."""
    return Trained(config, root.name, root, {}, root, {"seed": 99}, {})


def analysed(root, judges: list[str], seed: int = 3) -> None:
    builder = fake_study.Builder(root.parent)
    builder.close(builder.open("06_analysis", "study", {"judges": judges, "seed": seed}), "analysed")


def test_the_card_and_06_find_the_same_fitness(tmp_path, monkeypatch):
    root = fake_study.build_study(tmp_path, 5, ("checklist", "embedding"), 2)
    folder = fake_study.run_analysis(root, 5, ("checklist", "embedding"), 2, monkeypatch)
    table = pd.read_parquet(folder / "tables" / "fitness.parquet").set_index("config")
    for config, row in table.iterrows():
        held = held_against_bar(of(root, str(config)))
        assert held is not None and ("; ".join(held.reasons) or "fit") == row["what is missing"], config
        assert np.allclose(held[:6], row.iloc[:6].astype(float), equal_nan=True), config


def test_a_checklist_that_failed_its_gate_says_nothing_about_content(tmp_path):
    root = fake_study.build_study(tmp_path, 3, ("embedding",), 0)
    builder, planted = fake_study.Builder(tmp_path), fake_study.truth(fake_study.design(3))["quality"]
    fake_study.add_judge(builder, np.random.default_rng(1), "checklist", planted, passed=False)
    analysed(root, ["checklist", "embedding"])
    assert (root / "judge-checklist/05_judge/tables/checks.parquet").is_file()
    held = held_against_bar(of(root, "c01"))
    assert held is not None and held.coverage is None and "what its answers hold" in held.not_measured


def test_a_judge_that_06_did_not_read_says_nothing(tmp_path):
    root = fake_study.build_study(tmp_path, 3, ("checklist", "embedding"), 0)
    assert held_against_bar(of(root, "c01")) is None
    analysed(root, ["embedding"])
    held = held_against_bar(of(root, "c01"))
    assert held is not None and held.coverage is None
    assert not any("checklist" in reason for reason in held.reasons)
