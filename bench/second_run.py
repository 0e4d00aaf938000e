"""Does a second run of some configurations lie within what the first one stated?

`python bench/second_run.py FIRST SECOND`, two results.csv; outputs/reference/results.csv is the published run's. Of the
configurations in both: the validation loss within its 95 % interval, the energy of training within its interval where
it is an estimate, its ratio to the first run's beside, and, where all configurations of the first run are in the
second, each judge's score within the first one's interval. It ends with 1 if anything lies outside.
"""

import sys
from pathlib import Path

import pandas as pd

BOUNDS = {
    "val_loss": ("val_loss_low", "val_loss_high"),
    "train_energy_wh": ("train_energy_low_wh", "train_energy_high_wh"),
}


def compared(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """One row for each configuration in both and each value with an interval in the first.

    Args:
        first, second: results tables, by config.

    Returns:
        config, value (its name), first, low, high, second, ratio and inside (True or False).
    """
    names = [config for config in first.index if config in second.index]
    bounds = dict(BOUNDS)
    if len(names) == len(first):  # scores are relative to the configurations that were judged together
        judges = [name.removesuffix("_score") for name in first.columns if name.endswith("_score")]
        bounds |= {f"{judge}_score": (f"{judge}_low", f"{judge}_high") for judge in judges}
    rows = []
    for value, (low, high) in bounds.items():
        if value in second.columns:
            for name in names:
                old, new = first.loc[name], second.loc[name, value]
                rows.append((name, value, old[value], old[low], old[high], new, new / old[value]))
    table = pd.DataFrame(rows, columns=["config", "value", "first", "low", "high", "second", "ratio"])
    table = table.dropna(subset=["low", "high", "second"])
    return table.assign(inside=table["second"].between(table["low"], table["high"]))


def main(first: str, second: str) -> None:
    table = compared(*(pd.read_csv(Path(path)).set_index("config") for path in (first, second)))
    if not len(table):
        sys.exit("No configuration of the first run has a result with an interval in the second.")
    print(table.round(4).to_string(index=False))
    for value, rows in table.groupby("value", sort=False):
        ends = f"{rows['ratio'].min():.3f} to {rows['ratio'].max():.3f}"
        print(f"{value}: {rows['inside'].sum()} of {len(rows)} inside; ratio {ends}")
    sys.exit(not table["inside"].all())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
