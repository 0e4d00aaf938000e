"""Expected quality: scores shrunk towards what the factors of the design predict.

The best of many noisy scores is too high, and its configuration often not the best. The expected score of a
configuration, given all scores, lies between its own and the prediction of the main effects, the nearer to its own the
more the configurations differ beyond main effects and noise. This is the predictor of Fay and Herriot (1979) for
estimates with known errors, averaged over the spread beyond main effects by its restricted likelihood.

In 200 simulated studies of the shipped design (scores with an SD of .25) choosing by it loses .072 log-odds where the
highest score loses .096, with main effects and few interactions; with interactions alone .123 against .112.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import linalg

from telco_nb.analysis.effects import FACTORS, design_matrix

GRID = 60  # values of the spread beyond main effects
LEAST_LEFT = 4  # configurations beyond the coefficients, or the prediction is the mean alone


def expected_scores(scores: pd.Series, draws: pd.DataFrame, configs: pd.DataFrame | None = None) -> pd.Series:
    """The expected true scores.

    Args:
        scores: score by configuration, in log-odds.
        draws: scores as (draws, configurations); their covariance is that of the errors.
        configs: the levels of the factors by configuration; None: the prediction is the mean.

    Returns:
        By configuration, in the order of `scores`.
    """
    n, y = len(scores), scores.to_numpy(float)
    if n < 3:
        return scores.astype(float)
    noise = np.cov(draws[list(scores.index)].to_numpy(float), rowvar=False)
    x = _predictors(configs.loc[scores.index] if configs is not None else None, n)

    spread = 2 * float(np.sqrt(y.var() + np.trace(noise) / n))
    if not spread > 0:  # equal scores without any noise: the matrices below would be singular
        return scores.astype(float)
    expected, log_weights = [], []
    for sd in np.linspace(0, spread, GRID + 1)[1:]:
        v = noise + sd**2 * np.eye(n)
        factor = linalg.cho_factor(v)
        solved = linalg.cho_solve(factor, np.column_stack([x, y]))
        inner = x.T @ solved[:, :-1]
        rest = y - x @ np.linalg.solve(inner, x.T @ solved[:, -1])
        pulled = linalg.cho_solve(factor, rest)
        expected.append(y - rest + sd**2 * pulled)
        log_weights.append(-np.log(np.diag(factor[0])).sum() - np.linalg.slogdet(inner)[1] / 2 - rest @ pulled / 2)
    weights = np.exp(np.array(log_weights) - max(log_weights))
    return pd.Series(weights @ np.array(expected) / weights.sum(), scores.index)


def _predictors(configs: pd.DataFrame | None, n: int) -> np.ndarray:
    """A basis of the main effects, or the intercept alone if they leave too few configurations over."""
    alone = np.ones((n, 1))
    if configs is None or not set(FACTORS) <= set(configs) or configs[list(FACTORS)].isna().any().any():
        return alone
    basis = linalg.orth(design_matrix(configs)[0].to_numpy(float))
    return basis if n - basis.shape[1] >= LEAST_LEFT else alone
