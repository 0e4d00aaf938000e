"""Before hosted models are asked: what will leave this machine, for which hosts, and what it will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telco_nb import ROOT, calls, generator, glossary, prices, scenarios, synth
from telco_nb.providers import Source
from telco_nb.steps import Job

SENT = {"generator": "fact cards and scenario readings, no customer data"}
SAMPLED = 40  # conversations that the offline grammar writes, to measure their length


def preview(job: Job, source: Source, plan: Sequence[Job], root: Path) -> tuple[prices.Estimate, str]:
    """(estimate of the calls that a job has still to make, what is sent in them). `plan`: all jobs of the study."""
    return _generator(job, source, plan, root), SENT["generator"]


def price_of(values: Mapping[str, Any], prefix: str, source: Source) -> prices.Prices:
    return prices.Prices(source, values[f"{prefix}_input_usd_per_mtok"], values[f"{prefix}_output_usd_per_mtok"])


def _generator(job: Job, source: Source, plan: Sequence[Job], root: Path) -> prices.Estimate:
    values = job.parameters
    cards = glossary.load(ROOT / next(j.parameters["glossary_path"] for j in plan if j.step == "01_glossary"))
    axes = scenarios.load_axes(ROOT / values["axes_path"])
    grid = scenarios.build(cards, axes, values["seed"])
    planned = generator.plan(cards, grid, axes, values["seeds_per_scenario"])
    path = generator.store_path(root)
    if path.is_file():
        planned = generator.unanswered(planned, calls.AttemptStore(path), source, values["seed"])
    by_id = {card.id: card for card in cards}
    some = [synth.write(by_id[s.term_id], s, 0, axes, values["seed"]) for s in grid[:: max(1, len(grid) // SAMPLED)]]
    words = sum(len(m["content"].split()) for c in some for m in c["messages"]) / sum(c["n_turns"] for c in some)
    return generator.estimate(planned, price_of(values, "generator", source), values["seed"], words)
