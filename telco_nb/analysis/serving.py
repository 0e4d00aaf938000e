"""What answering customers costs: energy, money and CO2e of a million answers, from the energy of one.

Energy per answer is that of 04: this machine, its batches, nothing for an idle server. Prices and carbon are
parameters: assumptions of the reader, without an interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from telco_nb.analysis.statements import Finding
from telco_nb.analysis.statistics import Interval
from telco_nb.judge.ranking import interval_text

MILLION = 1e6
WH_PER_KWH = 1000.0
GRAMS_PER_KG = 1000.0
ENDS = ("", "_low", "_high")
Metrics = Mapping[str, Mapping[str, Any]]  # by configuration


class Rates(NamedTuple):
    """What a kWh costs: `usd_per_kwh` in US dollars, `carbon_g_per_kwh` in grams of CO2e, and `carbon_source`,
    whose electricity that is, when and who says so.

    `pue` is the power usage effectiveness: energy of the whole site over that of its machines. Money and CO2e are those
    of the site, energy is always the machine's.
    """

    usd_per_kwh: float
    carbon_g_per_kwh: float
    carbon_source: str
    pue: float = 1.0


def million_answers(answering: Metrics, training: Metrics, rates: Rates) -> pd.DataFrame:
    """What a million answers of each configuration take.

    Args:
        answering: metrics of 04 by configuration or `untuned`, with `answer_energy_per_answer_wh`, its ends, and
            `energy_kind`.
        training: metrics of 03 by configuration, with `train_energy_wh` and `energy_kind`.
        rates: prices of a kWh.

    Returns:
        A DataFrame by configuration: kwh, kwh_low, kwh_high, usd, co2e_kg, break_even_answers, after which answering
        has taken more energy than training (missing where the two energies are of different kinds), train_co2e_g, the
        CO2e of the training, pue, which usd, co2e_kg and train_co2e_g hold and the energies do not, and energy_kind,
        that of answering. A value without a measurement or an estimate is
        missing.
    """
    rows = {}
    for config, metrics in answering.items():
        per_answer = [metrics.get(f"answer_energy{end}_per_answer_wh") for end in ENDS]
        kwh, low, high = (float("nan") if wh is None else wh * MILLION / WH_PER_KWH for wh in per_answer)
        trained, kind = training.get(config, {}).get("train_energy_wh"), metrics.get("energy_kind")
        alike = training.get(config, {}).get("energy_kind") == kind
        even = trained / per_answer[0] if trained is not None and per_answer[0] and alike else None
        rows[config] = {
            "kwh": kwh,
            "kwh_low": low,
            "kwh_high": high,
            "usd": kwh * rates.pue * rates.usd_per_kwh,
            "co2e_kg": kwh * rates.pue * rates.carbon_g_per_kwh / GRAMS_PER_KG,
            "break_even_answers": even,
            "train_co2e_g": None if trained is None else trained / WH_PER_KWH * rates.pue * rates.carbon_g_per_kwh,
            "pue": rates.pue,
            "energy_kind": kind,
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("config")
    return table.astype(dict.fromkeys(table.columns.drop("energy_kind"), float))


def serving_finding(table: pd.DataFrame, config: str | None, rates: Rates) -> Finding:
    """The cost of a million answers of one configuration, in words.

    Args:
        table: from `million_answers`.
        config: the front-runner; None if there is none.
        rates: those of the table.
    """
    if config is None or config not in table.index or pd.isna(table.loc[config, "kwh"]):
        reason = "no configuration is named" if config is None else f"the energy of an answer of {config} is not known"
        return Finding("serving", f"What a million answers cost is not known: {reason}.", verdict="not estimable")
    row = table.loc[config]
    kind = "energy of unknown kind" if pd.isna(row["energy_kind"]) else row["energy_kind"]
    energy = f"{row['kwh']:.2g} kWh {interval_text(row['kwh_low'], row['kwh_high'], '.2g')} ({kind})"
    money = f"{row['usd']:.2g} USD of electricity at {rates.usd_per_kwh:g} USD a kWh"
    carbon = f"{row['co2e_kg']:.2g} kg CO2e at {rates.carbon_g_per_kwh:g} g a kWh ({rates.carbon_source})"
    overhead = "" if rates.pue == 1 else f" and a PUE of {rates.pue:g}"
    text = (
        f"A million answers of {config} take {energy}: {money} and {carbon}{overhead}, on this machine, without idle "
    )
    text += "servers."
    if not pd.isna(row["break_even_answers"]):
        text += f" After {row['break_even_answers']:,.0f} answers, answering has taken more energy than training."
    kwh = Interval(row["kwh"], row["kwh_low"], row["kwh_high"])
    return Finding("serving", text, *kwh)
