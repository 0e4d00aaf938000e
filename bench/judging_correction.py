"""How often do 95 % intervals of scores that votes correct hold the truth, if the corrected judge is biased?

`python bench/judging_correction.py [studies]`; the default, 200, takes about 2 minutes on 2 cores.

Each study has 16 configurations, votes on pairs of a blind export (those with close scores first), and a judge that
judges all pairs on all prompts with a bias of its own. Votes on one term hang together. The truth is what votes without
end on the same pairs would give. Good is a share near 95 %, whatever the bias.
"""

import sys
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd

from telco_nb.analysis import correction
from telco_nb.judge import blind_pairs

CONFIGS = [f"c{i:02d}" for i in range(1, 17)]
ABILITIES = np.linspace(-1.2, 1.2, len(CONFIGS))
TIE, FIRST_SEAT = -0.7, 0.3
TERM_SD, PROMPT_SD = 0.6, 0.8  # how much scores differ by term and by prompt
ENDLESS = 150  # studies whose votes together are taken for votes without end


class Bias(NamedTuple):
    """How a judge differs from the voters: `reverse` turns the scores upside down, `spread` is the SD of a bias for
    each configuration, `shared` how much it sees of what term and prompt add, `tie` its tie term."""

    reverse: bool = False
    spread: float = 0.0
    shared: float = 1.0
    tie: float = TIE


BIASES = {
    "none": Bias(),
    "prefers some configurations": Bias(spread=1.0),
    "prefers some, sees little": Bias(spread=1.0, shared=0.2),
    "upside down": Bias(reverse=True),
    "upside down, never a tie": Bias(reverse=True, tie=-20.0),
    "no idea": Bias(shared=0.0, spread=2.0),
}


def outcome(eta: np.ndarray, tie: float, rng: np.random.Generator) -> np.ndarray:
    """1, .5 or 0 for the first of two, drawn from Davidson's model."""
    shares = np.exp(np.stack([eta / 2, np.full_like(eta, tie), -eta / 2]))
    shares = np.cumsum(shares / shares.sum(0), axis=0)
    return 1 - (rng.random(eta.shape) > shares[:2]).sum(0) / 2


def plan(n_votes: int, abilities: np.ndarray, seed: int) -> list[tuple[int, int]]:
    """The pairs of configurations of a blind export after a first, noisy ranking."""
    rng = np.random.default_rng(seed)
    draws = pd.DataFrame(abilities + rng.normal(0, 0.5, (200, len(CONFIGS))), columns=CONFIGS)
    order = blind_pairs.pair_order(blind_pairs.worth_of_pairs([draws], CONFIGS), len(CONFIGS), n_votes, rng)
    return [next(order) for _ in range(n_votes)]


def draw_votes(
    pairs: list[tuple[int, int]], n_terms: int, per_term: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, np.ndarray]:
    """Votes on the pairs, each on another prompt; and what term and prompt add to every score, (prompts, configs)."""
    n, term = n_terms * per_term, np.repeat(np.arange(n_terms), per_term)
    local = rng.normal(0, TERM_SD, (n_terms, len(CONFIGS)))[term] + rng.normal(0, PROMPT_SD, (n, len(CONFIGS)))
    first, second = np.array(pairs).T
    flip = rng.random(len(pairs)) < 0.5
    first, second = np.where(flip, second, first), np.where(flip, first, second)
    prompt, here = np.resize(rng.permutation(n), len(pairs)), ABILITIES + local
    drawn = outcome(here[prompt, first] - here[prompt, second] + FIRST_SEAT, TIE, rng)
    return _table(first, second, prompt, term, drawn), local


def study(
    pairs: list[tuple[int, int]], bias: Bias, n_terms: int, per_term: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The votes and the judge's verdicts of one study, with the columns that `correct_scores` reads."""
    rng = np.random.default_rng(seed)
    voted, local = draw_votes(pairs, n_terms, per_term, rng)
    n, k = local.shape
    own = np.random.default_rng(99).normal(0, 1, k) * bias.spread
    seen = ABILITIES * (-1 if bias.reverse else 1) + own + bias.shared * local
    i, j = np.triu_indices(k, 1)
    drawn = outcome((seen[:, i] - seen[:, j]).ravel(), bias.tie, rng)
    term, prompt = np.repeat(np.arange(n_terms), per_term), np.repeat(np.arange(n), len(i))
    return voted, _table(np.tile(i, n), np.tile(j, n), prompt, term, drawn)


def _table(
    first: np.ndarray, second: np.ndarray, prompt: np.ndarray, term: np.ndarray, drawn: np.ndarray
) -> pd.DataFrame:
    names = np.array([*CONFIGS, "tie"])
    won = np.select([drawn == 1, drawn == 0], [first, second], len(CONFIGS))
    columns = {"config_first": names[first], "config_second": names[second], "winner": names[won], "o": drawn}
    columns |= {"verdict": np.array(["B", "tie", "A"])[(2 * drawn).astype(int)]}
    return pd.DataFrame(
        columns | {"prompt_id": prompt, "term_id": term[prompt], "purpose": "ranking", "source": "votes"}
    )


@cache
def truth(n_votes: int, n_terms: int, per_term: int) -> pd.Series:
    """The scores that votes without end give on the pairs of a plan."""
    pairs = plan(n_votes, ABILITIES, seed=0)
    votes = pd.concat(
        [draw_votes(pairs, n_terms, per_term, np.random.default_rng(10_000 + i))[0] for i in range(ENDLESS)]
    )
    x = np.zeros((len(votes), len(CONFIGS) + 1))
    for seat, sign in (("first", 1), ("second", -1)):
        x[np.arange(len(votes)), pd.Index(CONFIGS).get_indexer(votes[f"config_{seat}"])] = sign
    x[:, -1] = 1
    return pd.Series(correction.solve(x, votes["o"].to_numpy())[:-1], index=CONFIGS)


def coverage(bias: Bias, studies: int, n_votes: int = 160, n_terms: int = 52, per_term: int = 4) -> dict[str, float]:
    """Shares of intervals that hold the truth, corrected and by votes alone, and what the correction gained.

    Args:
        bias: of the judge.
        studies: how many.
        n_votes: of each study.
        n_terms, per_term: terms, and prompts of each.
    """
    pairs, right = plan(n_votes, ABILITIES, seed=0), truth(n_votes, n_terms, per_term)
    found = []
    for seed in range(studies):
        result = correction.correct_scores("j", "v", *study(pairs, bias, n_terms, per_term, seed), CONFIGS)
        if result is None:
            continue
        table = result.table.set_index("config").loc[CONFIGS]
        low, high = table["low"], table["high"]
        known = low.notna() & high.notna()
        one = {"corrected": ((low <= right) & (right <= high))[known].mean()}
        one["votes alone"] = ((table["votes_low"] <= right) & (right <= table["votes_high"]))[known].mean()
        one["judge's error"] = (table["judge_score"] - right).abs().mean()
        one["error"] = (table["score"] - right).abs().mean()
        one["width"] = ((high - low) / (table["votes_high"] - table["votes_low"]))[known].mean()
        found.append(one | {"weight": result.weight, "bounds": known.mean()})
    return dict(pd.DataFrame(found).mean()) | {"studies": len(found)}


if __name__ == "__main__":
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"shares of 95 % intervals that hold the truth; {studies} studies of 16 configurations each")
    designs = [(160, name) for name in BIASES] + [(n, name) for n in (100, 400) for name in ("none", "upside down")]
    for n_votes, name in designs:
        found = coverage(BIASES[name], studies, n_votes)
        print(f"{n_votes} votes, {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()), flush=True)
