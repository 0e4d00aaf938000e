"""Main effects, what a design can tell apart, and the noise between seeds."""

from __future__ import annotations

import itertools
import math

import fake_study
import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from fake_study import make_study

from telco_nb.analysis.effects import (
    FACTORS,
    design_facts,
    effect_tables,
    is_16_run_array,
    main_effects,
    noise_floor,
)


def test_main_effects_equal_statsmodels():
    configs = fake_study.design()
    response = fake_study.truth(configs)["loss"]
    ours = main_effects(configs, response).set_index("contrast")
    levels = "C(target_modules, Treatment('qv')) + C(rank) + C(epochs) + C(learning_rate)"
    fit = smf.ols(f"y ~ {levels}", configs.assign(y=response)).fit()
    for contrast, term in (
        ("qv -> all", "C(target_modules, Treatment('qv'))[T.all]"),
        ("1 -> 4", "C(epochs)[T.4]"),
        ("0.0002 -> 0.001", "C(learning_rate)[T.0.001]"),
    ):
        assert ours.loc[contrast, "effect"] == pytest.approx(fit.params[term])


def test_main_effects_of_a_balanced_design_are_differences_of_level_means():
    configs = fake_study.design()
    response = fake_study.truth(configs)["loss"]
    ours = main_effects(configs, response).set_index("contrast")["effect"]
    for factor, low, high in (("epochs", 1, 4), ("rank", 8, 64), ("target_modules", "qv", "mlp")):
        means = response.groupby(configs[factor]).mean()
        assert ours[f"{low} -> {high}"] == pytest.approx(means[high] - means[low])


def test_energy_effects_are_ratios():
    configs = fake_study.design()
    energy = pd.Series(np.where(configs["epochs"] == 4, 40.0, 10.0), configs.index)
    noisy = energy * np.exp(np.random.default_rng(0).normal(0, 1e-4, 16))
    effects = main_effects(configs, noisy, log=True).set_index("contrast")
    assert effects.loc["1 -> 4", "effect"] == pytest.approx(4, rel=1e-3)
    assert effects.loc["8 -> 64", "effect"] == pytest.approx(1, rel=1e-3)
    exact = main_effects(configs, energy, log=True)
    assert not exact["estimable"].any() and "nothing that could be noise" in exact["reason"].iloc[0]


def test_the_default_design_is_orthogonal_and_clear_of_two_factor_interactions():
    facts = design_facts(fake_study.design())
    assert facts[["varied", "separable", "clear"]].all().all()


def test_a_design_says_what_it_cannot_tell_apart():
    grid = itertools.product(("qv", "mlp", "all"), ((8, 1), (64, 4)), (1e-4, 1e-3))
    rows = [(target, rank, epochs, rate) for target, (rank, epochs), rate in grid]
    together = pd.DataFrame(rows, columns=list(FACTORS))
    facts = design_facts(together).set_index("factor")
    assert not facts.loc["rank", "separable"]
    assert facts.loc["target_modules", "separable"]
    effects = main_effects(together, pd.Series(np.arange(12.0))).set_index("factor")
    assert math.isnan(effects.loc["epochs", "effect"])
    assert "cannot be separated" in effects.loc["epochs", "reason"]
    configs = fake_study.design()
    half = configs[configs["learning_rate"] > 4e-4]  # rank is then target x epochs
    assert not design_facts(half).set_index("factor").loc["rank", "clear"]


@pytest.mark.parametrize("n", [2, 3])
def test_two_or_three_configurations_give_reasons_instead_of_effects(n):
    effects = effect_tables(make_study(n))
    assert not effects["estimable"].any()
    assert effects[["effect", "low", "high"]].isna().all().all()
    assert (effects["reason"] != "").all()


def test_noise_floor_is_the_pooled_spread_between_seeds():
    results = pd.DataFrame({"val_loss": [0.50, 0.60, 0.70]}, index=["c1", "c2", "c3"])
    repeats = pd.DataFrame({"config": ["c1", "c1", "c2"], "seed": [1, 2, 1], "val_loss": [0.51, 0.52, 0.63]})
    noise = noise_floor(results, repeats, "val_loss")
    pooled = math.sqrt((2 * 0.01**2 + 0.03**2 / 2) / 3)
    assert noise.between_seeds.value == pytest.approx(pooled)
    assert (noise.df, noise.n_runs) == (3, 5)
    assert noise.between_seeds.low < pooled < noise.between_seeds.high
    assert noise.resolution > 2.7 * pooled  # t with 3 degrees of freedom, not 1.96
    assert noise_floor(results, repeats.iloc[:0], "val_loss") is None


def test_only_the_16_configurations_of_the_orthogonal_array_are_called_one():
    configs = fake_study.design()
    assert is_16_run_array(configs) and is_16_run_array(configs.sample(frac=1, random_state=1))
    assert not is_16_run_array(configs.head(15)) and not is_16_run_array(fake_study.design(24))
    assert not is_16_run_array(configs.assign(learning_rate=configs["epochs"] / 1000))  # 16, but two factors are one
