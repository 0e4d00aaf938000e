"""The drift of the machine: one configuration trained first of all and, with the same seed, once more last of all.

Both trainings do the same arithmetic. What differs in their energy is the machine: its temperature, its clock, its
other work. Configurations whose energies are closer than that cannot be told apart by one training each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from telco_nb.analysis.statements import Finding, not_estimable
from telco_nb.study.params import config_of

HOUR_S = 3600.0
Metrics = Mapping[str, Mapping[str, Any]]


def drift_findings(training: Metrics, again: Metrics) -> list[Finding]:
    """One finding for each run of `again`, named `<config>-drift`; none without one.

    Args:
        training: metrics of 03 by configuration.
        again: metrics of 03 by run.
    """
    began = [_began(metrics) for metrics in training.values() if metrics.get("train_started_at")]
    return [drift_finding(config_of(run), training[config_of(run)], metrics, began) for run, metrics in again.items()]


def drift_finding(
    config: str, first: Mapping[str, Any], again: Mapping[str, Any], began: Sequence[datetime] = ()
) -> Finding:
    """Energy, time and loss of the second training of a configuration beside those of the first.

    Args:
        config: its name.
        first, again: metrics of 03 of the two trainings, with `train_energy_wh`, `energy_kind`, `energy_valid`,
            `train_seconds`, `val_loss`, `train_started_at`, `node` and `visible_gpus`.
        began: when the trainings of all configurations began.

    Returns:
        The finding `drift`; its value is the ratio of the energies, second over first.
    """
    text = f"The drift of the machine, from {config} trained first and again last with the same seed"
    both = (first, again)
    if not all(run.get("train_started_at") for run in both):
        return not_estimable("drift", text, "a record does not say when its training began")
    if not all(_began(first) <= start <= _began(again) for start in began):
        return not_estimable("drift", text, "it was trained again in another order, so they are not first and last")
    if any(first.get(name) != again.get(name) for name in ("node", "visible_gpus")):
        return not_estimable("drift", text, "the two ran on different cards or machines")
    kinds = [run.get("energy_kind") for run in both]
    if any(run.get("train_energy_wh") is None or not run.get("energy_valid") for run in both):
        return not_estimable("drift", text, "one of the two energies is missing or not valid")
    if kinds[0] != kinds[1]:
        return not_estimable("drift", text, f"one energy is {kinds[0]}, the other {kinds[1]}")
    energies = [float(run["train_energy_wh"]) for run in both]
    ratio, pace = energies[1] / energies[0], again["train_seconds"] / first["train_seconds"]
    return Finding(
        "drift",
        f"{config} was trained again {_hours(first, again):.1f} h later with the same seed: {energies[0]:.3g} Wh, then "
        f"{energies[1]:.3g} Wh ({ratio - 1:+.1%}, {kinds[0]}), in {pace:.2f} times the time; {_losses(first, again)}. "
        f"{_at_rest(first, again)}Energies of configurations that differ by less than {abs(ratio - 1):.1%} can be the "
        "machine's drift.",
        ratio,
    )


def _at_rest(first: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    """The power at rest before both trainings, of each component where both were measured; empty without one."""
    watts = [(name, first.get(f"idle_{name}_w"), again.get(f"idle_{name}_w")) for name in ("cpu", "gpu", "battery")]
    told = [f"the {name} drew {a:.1f} W, then {b:.1f} W" for name, a, b in watts if a is not None and b is not None]
    return f"At rest {' and '.join(told)}. " if told else ""


def _hours(first: Mapping[str, Any], again: Mapping[str, Any]) -> float:
    return (_began(again) - _began(first)).total_seconds() / HOUR_S


def _began(run: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(run["train_started_at"])


def _losses(first: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    losses = [run["val_loss"] for run in (first, again)]
    if None in losses:  # metrics hold no NaN
        return "a validation loss is missing"
    if losses[0] == losses[1]:
        return "the validation loss is the same to the last bit"
    return f"the validation loss differs by {abs(losses[1] - losses[0]):.2g} nats per token"
