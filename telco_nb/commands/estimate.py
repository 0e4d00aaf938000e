"""Estimates the cost of the calls to hosted models before a run, and names the data that they send."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from telco_nb import DATA_DIR, ROOT
from telco_nb.corpus import choices, gold, llm_writer, scenarios, variants
from telco_nb.corpus.cards import load_cards
from telco_nb.hosted import attempts, lines, prices
from telco_nb.hosted.api import HostedModel
from telco_nb.judge import cases, language_model, protocol
from telco_nb.judge.language_model import LanguageModelJudge
from telco_nb.judge.prompts import render_prompt
from telco_nb.judge.store import VerdictStore
from telco_nb.notebook import data_path
from telco_nb.study.plan import Job
from telco_nb.study.record import RecordError, read_table

SENT = {
    "generator": "fact cards and scenario readings, no customer data",
    "judge": "test conversations, fact cards and the answers of the trained models",
}
SAMPLED = 40  # conversations whose length is measured
VERDICT_TOKENS = (60.0, 130.0, 260.0)  # an analysis of at most 80 words and a line of JSON; reasoning models write more
MEASURED_FROM = 10  # number of questions with counted tokens from which on their lengths are used for all


def estimate_job(job: Job, hosted_model: HostedModel, plan: Sequence[Job], root: Path) -> tuple[prices.Estimate, str]:
    """Estimates the calls that a job still has to make.

    Args:
        job: a job of 02_synth or 05_judge.
        hosted_model: the model that it calls.
        plan: all jobs of the study.
        root: the study's folder.

    Returns:
        The estimate, and a description of the data that the calls send.
    """
    values = {name: value for other in plan for name, value in other.parameters.items() if other.step < job.step}
    values |= job.parameters
    prefix = "generator" if job.step == "02_synth" else "judge"
    declared = values[f"{prefix}_input_usd_per_mtok"], values[f"{prefix}_output_usd_per_mtok"]
    price = prices.Prices(hosted_model, *declared)
    estimate = _estimate_generator if prefix == "generator" else _estimate_judge
    return estimate(Corpus(values), price, root), SENT[prefix]


class Corpus:
    """Cards, contexts, scenarios and gold conversations of a study, from its parameters."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.cards = load_cards(ROOT / values["glossary_path"])
        self.by_id = {card.id: card for card in self.cards}
        self.contexts = scenarios.load_contexts(ROOT / values["contexts_path"])
        self.grid = scenarios.build_scenarios(self.cards, self.contexts, values["unseen_terms"])
        self.gold = gold.load_gold(data_path(values["gold_path"]), self.grid)

    def planned(self) -> llm_writer.Plan:
        """The calls of the hosted generator; number 0 of a scenario is its gold conversation, in a study with gold."""
        numbers = range(1 if self.gold else 0, self.values["conversations_per_scenario"])
        return llm_writer.plan_calls(self.cards, self.grid, self.contexts, numbers)

    def sample(self) -> list[dict[str, Any]]:
        """Conversations of typical length: gold ones, without them variants by rule."""
        if self.gold:
            return self.gold[:: max(1, len(self.gold) // SAMPLED)]
        grid = self.grid[:: max(1, len(self.grid) // SAMPLED)]
        return list(variants.write_variants(self.cards, grid, self.contexts, range(1)))

    def count_prompts(self) -> int:
        """The largest possible number of prompts in the test sets test, noisy, unseen and own."""
        splits = [scenario.split for scenario in self.grid]
        noisy = gold.load_noisy(data_path(self.values["noisy_path"]), self.grid)
        available = {"test": splits.count("test"), "noisy": len(noisy), "unseen": splits.count("unseen")}
        limits = {name: self.values[f"{name}_prompts"] for name in available}
        taken = [n if limits[name] is None else min(n, limits[name]) for name, n in available.items()]
        return sum(taken) + len(gold.load_prompts(data_path(self.values["prompts_path"]), self.cards))


def read_own_data(jobs: Sequence[Job]) -> None:
    """Read the cards and texts of one's own that 01 and 02 are about to read; shipped ones alone are taken as good.

    Args:
        jobs: all jobs of the study.

    Raises GlossaryError, WrittenFileError, InputFileError or ParameterError as the notebooks would, for a fault.
    """
    values = {name: value for job in jobs if job.step < "03" for name, value in job.parameters.items()}
    files = {name: data_path(value) for name, value in values.items() if name.endswith("_path")}
    if all(path is None or path.resolve().is_relative_to(DATA_DIR) for path in files.values()):
        return
    corpus = Corpus(values)
    corpus.count_prompts()
    gold.load_reviews(files.get("reviews_path"), corpus.grid)
    choices.load_general(files.get("general_path"))


def _estimate_generator(corpus: Corpus, price: prices.Prices, root: Path) -> prices.Estimate:
    """The unanswered calls, at the measured lengths if the store has enough of them."""
    model, calls = price.hosted_model, corpus.planned()
    path = llm_writer.store_path(root)
    if path.is_file():
        calls = llm_writer.unanswered_calls(calls, attempts.AttemptStore(path), model)
    if lengths := measured(path, model.model):
        return prices.estimate(price, sum(map(len, calls)), *lengths)
    sample = corpus.sample()
    words = sum(len(m["content"].split()) for c in sample for m in c["messages"]) / sum(c["n_turns"] for c in sample)
    return llm_writer.estimate_cost(calls, price, words)


def _estimate_judge(corpus: Corpus, price: prices.Prices, root: Path) -> prices.Estimate:
    """The unanswered questions of the protocol and its gate, at the measured lengths or those of a typical pair."""
    values = corpus.values
    ids = [f"{i:05d}" for i in range(corpus.count_prompts())]
    prompts = pd.DataFrame({"prompt_id": ids, "scenario_id": ids, "term_id": ids})
    path = protocol.store_path(root, values["judge"])
    answered = len(VerdictStore(path).ok) if path.is_file() else 0
    calls = max(0, protocol.count_questions(values, prompts) - answered)
    if lengths := measured(path, price.hosted_model.model):
        return prices.estimate(price, calls, *lengths)
    length = _mean_answer(root)
    sizes = [_pair_characters(corpus, c, length) for c in corpus.sample()]
    return _at_length(price, calls, sum(sizes) / len(sizes))


def _pair_characters(corpus: Corpus, conversation: Mapping[str, Any], answer_length: int | None) -> int:
    """Characters of the prompt on two answers of this length, or of the reference's length if it is None."""
    question, reference = (message["content"] for message in conversation["messages"][:2])
    answer = reference if answer_length is None else "x" * answer_length
    card, problem_id = corpus.by_id[conversation["term_id"]], conversation["problem_id"]
    case = cases.Case("pair", card, problem_id, (("user", question),), reference, (answer, answer))
    return len(render_prompt(case).text)


def _at_length(price: prices.Prices, calls: int, characters: float) -> prices.Estimate:
    tokens_in = characters / prices.BYTES_PER_TOKEN
    return prices.estimate(price, calls, (tokens_in, tokens_in, tokens_in), VERDICT_TOKENS)


def estimate_questions(judge: LanguageModelJudge, questions: Sequence[cases.Question], store: Path) -> prices.Estimate:
    """Estimates these questions at the lengths that the store has measured, else at their own.

    Args:
        judge: the judge.
        questions: the questions.
        store: the file of the judge's attempts.
    """
    if lengths := measured(store, judge.hosted_model.model):
        return prices.estimate(judge.price, len(questions), *lengths)
    characters = sum(len(language_model.request_for(question).text) for question in questions)
    return _at_length(judge.price, len(questions), characters / max(1, len(questions)))


def measured(store: Path, model: str) -> tuple[prices.Range, prices.Range] | None:
    """(tokens in, tokens out) per question to this model, repeated requests included; None if too few are stored.

    Each is the low end of the 95 % interval, the mean, and the high end.
    """
    counts: dict[str, list[int]] = {}
    for line in attempts.read_attempts(store):
        is_counted = all(lines.is_amount(line.get(name)) for name in ("tokens_in", "tokens_out"))
        question = line.get("judgement_id") or line.get("call_id")
        if is_counted and line.get("model_asked") == model and isinstance(question, str):
            total = counts.setdefault(question, [0, 0])
            total[0] += line["tokens_in"]
            total[1] += line["tokens_out"]
    if len(counts) < MEASURED_FROM:
        return None
    tokens_in, tokens_out = zip(*counts.values(), strict=True)
    return _mean_interval(tokens_in), _mean_interval(tokens_out)


def _mean_interval(numbers: Sequence[float]) -> prices.Range:
    """Low, mean and high: the mean and its 95 % t interval, not below 0."""
    mean, half = float(np.mean(numbers)), float(stats.t.ppf(0.975, len(numbers) - 1) * stats.sem(numbers))
    return max(0.0, mean - half), mean, mean + half


def _mean_answer(root: Path) -> int | None:
    """Mean characters of the answers on disk; None if there are none. A damaged file's step runs again."""
    answers = []
    for path in sorted(root.glob("*/04_energy/artefacts/answers.parquet")):
        with contextlib.suppress(RecordError):
            answers.append(read_table(path, ["answer"])["answer"].str.len())
    lengths = pd.concat(answers) if answers else pd.Series(dtype=float)
    return None if lengths.empty else round(lengths.mean())
