"""Before hosted models are asked: what will leave this machine, for which hosts, and what it will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb import ROOT
from telco_nb.corpus import llm_writer, scenarios, variants
from telco_nb.corpus.cards import Card, load_cards
from telco_nb.corpus.scenarios import Axes, Scenario
from telco_nb.hosted import attempts, prices
from telco_nb.hosted.api import HostedModel
from telco_nb.judge import cases, language_model, protocol
from telco_nb.judge.language_model import LanguageModelJudge
from telco_nb.judge.prompts import render_prompt
from telco_nb.judge.store import VerdictStore
from telco_nb.study.plan import Job

SENT = {
    "generator": "fact cards and scenario readings, no customer data",
    "judge": "test conversations, fact cards and the answers of the trained models",
}
SAMPLED = 40  # conversations that the offline grammar writes, to measure their length
VERDICT_TOKENS = (60.0, 130.0, 260.0)  # an analysis of at most 80 words and a line of JSON; a reasoning model says more
MEASURED_FROM = 10  # questions with counted tokens from which on their lengths are taken for those of all


def estimate_job(job: Job, source: HostedModel, plan: Sequence[Job], root: Path) -> tuple[prices.Estimate, str]:
    """(estimate of the calls that a job has still to make, what is sent in them). `plan`: all jobs of the study."""
    values = {name: value for each in plan for name, value in each.parameters.items() if each.step < job.step}
    values |= job.parameters
    cards = load_cards(ROOT / values["glossary_path"])
    axes = scenarios.load_axes(ROOT / values["axes_path"])
    grid = scenarios.build_scenarios(cards, axes, values["seed"])
    prefix = "generator" if job.step == "02_synth" else "judge"
    declared = values[f"{prefix}_input_usd_per_mtok"], values[f"{prefix}_output_usd_per_mtok"]
    price = prices.Prices(source, *declared)
    estimate = _generator if prefix == "generator" else _judge
    return estimate(values, cards, grid, axes, price, root), SENT[prefix]


def _written(values: Mapping[str, Any], cards: list[Card], grid: list[Scenario], axes: Axes) -> list[dict[str, Any]]:
    by_id = {card.id: card for card in cards}
    some = grid[:: max(1, len(grid) // SAMPLED)]
    return [variants.write_conversation(by_id[s.term_id], s, 0, axes, values["seed"]) for s in some]


def _generator(
    values: Mapping[str, Any], cards: list[Card], grid: list[Scenario], axes: Axes, price: prices.Prices, root: Path
) -> prices.Estimate:
    planned = llm_writer.plan_calls(cards, grid, axes, values["seeds_per_scenario"])
    path = llm_writer.store_path(root)
    if path.is_file():
        planned = llm_writer.unanswered_calls(planned, attempts.AttemptStore(path), price.source, values["seed"])
    if lengths := measured(path, price.source.model):
        return prices.estimate(price, sum(map(len, planned)), *lengths)
    some = _written(values, cards, grid, axes)
    words = sum(len(m["content"].split()) for c in some for m in c["messages"]) / sum(c["n_turns"] for c in some)
    return llm_writer.estimate_cost(planned, price, values["seed"], words)


def _judge(
    values: Mapping[str, Any], cards: list[Card], grid: list[Scenario], axes: Axes, price: prices.Prices, root: Path
) -> prices.Estimate:
    """All questions of the protocol and the gate, less the verdicts that the store holds, at the length of a pair.

    Lengths are measured if the store can tell; else answers are as long as those on disk, or as the grammar's.
    """
    held_out = [s.scenario_id for s in grid if s.split == "test"][: values["test_prompts"]]
    prompts = pd.DataFrame({"prompt_id": held_out, "scenario_id": held_out, "term_id": held_out})
    asked = protocol.count_questions(values, prompts)
    path = protocol.store_path(root, values["judge"])
    done = len(VerdictStore(path).ok) if path.is_file() else 0
    if lengths := measured(path, price.source.model):
        return prices.estimate(price, max(0, asked - done), *lengths)
    by_id, characters = {card.id: card for card in cards}, []
    longer = _mean_answer(root)
    for c in _written(values, cards, grid, axes):
        reference = c["messages"][1]["content"]
        answers = (reference, reference) if longer is None else ("x" * longer, "x" * longer)
        case = cases.Case(
            "pair", by_id[c["term_id"]], c["intent"], (("user", c["messages"][0]["content"]),), reference, answers
        )
        characters.append(len(render_prompt(case).text))
    tokens_in = sum(characters) / len(characters) / prices.BYTES_PER_TOKEN
    return prices.estimate(price, max(0, asked - done), (tokens_in, tokens_in, tokens_in), VERDICT_TOKENS)


def estimate_questions(judge: LanguageModelJudge, questions: Sequence[cases.Question], store: Path) -> prices.Estimate:
    """The cost of asking these questions: at the lengths that the store has measured, else at their own."""
    if lengths := measured(store, judge.source.model):
        return prices.estimate(judge.price, len(questions), *lengths)
    sent = sum(len(language_model.request_for(question).text) for question in questions) / max(1, len(questions))
    tokens_in = sent / prices.BYTES_PER_TOKEN
    return prices.estimate(judge.price, len(questions), (tokens_in, tokens_in, tokens_in), VERDICT_TOKENS)


def measured(store: Path, model: str) -> tuple[prices.Range, prices.Range] | None:
    """(tokens in, tokens out) of a question to this model as its attempts had them, re-asks included.

    Low, mid and high: the mean and its 95 % interval over the questions. None if too few have been asked.
    """
    counts: dict[str, list[int]] = {}
    for line in attempts.read_attempts(store):
        counted = line.get("tokens_in") is not None and line.get("tokens_out") is not None
        if counted and line.get("model_asked") == model:
            total = counts.setdefault(line.get("judgement_id") or line["call_id"], [0, 0])
            total[0] += line["tokens_in"]
            total[1] += line["tokens_out"]
    if len(counts) < MEASURED_FROM:
        return None
    sent, back = zip(*counts.values(), strict=True)
    return mean_with_interval(sent), mean_with_interval(back)


def mean_with_interval(numbers: Sequence[float]) -> prices.Range:
    """Low, mid, high: the mean and its 95 % interval by t, not below 0."""
    mean, half = float(np.mean(numbers)), float(stats.t.ppf(0.975, len(numbers) - 1) * stats.sem(numbers))
    return max(0.0, mean - half), mean, mean + half


def _mean_answer(root: Path) -> int | None:
    """Mean characters of the answers on disk, or None."""
    files = sorted(root.glob("*/04_energy/artefacts/answers.parquet"))
    texts = pd.concat([pd.read_parquet(f, columns=["answer"])["answer"] for f in files]) if files else None
    return None if texts is None else round(texts.str.len().mean())
