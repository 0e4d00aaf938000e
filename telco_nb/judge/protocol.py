"""All that a hosted judge is asked in a study, outside its notebook: for batches, the pilot and the price.

05_judge takes the same steps one by one. A question's id is made of all that it says, so what is answered here is not
asked again there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from telco_nb.corpus.cards import Card, load_cards
from telco_nb.hosted.api import ProviderError
from telco_nb.judge import asking, design, panel
from telco_nb.judge.cases import Question
from telco_nb.judge.gate import gate_result, planted_controls
from telco_nb.judge.language_model import LanguageModelJudge
from telco_nb.judge.store import VerdictStore, judged_rows
from telco_nb.study import params, record
from telco_nb.study.content_key import is_current
from telco_nb.study.params import ParameterError
from telco_nb.study.plan import UNTUNED, plan_jobs


@dataclass(frozen=True)
class Protocol:
    """A judge, its store, and its questions by part (verdicts.PARTS) in the order in which 05_judge asks them.

    `gate` is the plan of the part `controls`; `insists`: a failed gate does not end the asking.
    """

    judge: LanguageModelJudge
    store: VerdictStore
    parts: Mapping[str, list[Question]]
    gate: pd.DataFrame
    insists: bool

    @property
    def every(self) -> list[Question]:
        """Each question once: two configurations that answer alike can make one question of two."""
        return list({question.id: question for part in self.parts.values() for question in part}.values())

    def due(self, under_way: Collection[str] = ()) -> tuple[list[Question], str]:
        """(what a model may be asked now, why that): the gate, then all the rest; after a failed gate what it lacks.

        Verdicts that need no model are stored. `under_way`: ids of questions that were asked and not answered yet.
        """
        gate = self._unanswered(self.parts["controls"])
        if any(question.id in under_way for question in gate):
            return [], "the gate's questions are under way; nothing more is asked before they are answered"
        if any(not self.store.attempts[question.id] for question in gate):
            return gate, "the gate first"
        found = gate_result(self.judge.name, self.judge.kind, judged_rows(self.gate, self.store))
        if found["passed"] or self.insists:
            waiting = [question for question in self._unanswered(self.every) if question.id not in under_way]
            return waiting, "the gate passed" if found["passed"] else "the gate failed, and is told not to matter"
        failed = ", ".join(control["control"] for control in found["controls"] if not control["passed"])
        return gate, f"the gate failed ({failed}): only what it has no answer to can be asked again"

    def _unanswered(self, part: Iterable[Question]) -> list[Question]:
        waiting = [question for question in part if question.id not in self.store.ok]
        return asking.store_by_rule(self.judge, waiting, self.store)


def store_path(root: Path, judge: str) -> Path:
    """Where the attempts of a judge are kept, in the study's folder."""
    return root / f"judge-{judge}" / "store" / "verdicts.jsonl"


def open_study(profile: str, judge: str, params_dir: Path = params.PARAMS_DIR, *, to_ask: bool) -> Protocol:
    """The protocol of a judge of params/judges in a study whose answers are there.

    Raises ParameterError if there is no such judge, or if something is to be asked (`to_ask`) about answers that the
    next run would make anew. What was asked about them before can be collected all the same.
    """
    study = params.load_study(profile, params_dir)
    if judge not in study.judge_files:
        raise ParameterError(f"{params_dir / 'judges'}: no {judge}.yaml. Known: {', '.join(study.judge_files)}.")
    values = study.values(f"judge-{judge}")
    params.validate(values, f"{params_dir / 'judges' / judge}.yaml (with base.yaml and profiles/{profile}.yaml)")
    root = record.profile_root(profile)
    for job in plan_jobs(study) if to_ask else []:
        if job.step < "05" and job.scope not in study.repeats and not (checked := is_current(job, root))[0]:
            raise ParameterError(
                f"{job.id} has to run first ({checked[1]}), or the verdicts would be on other answers: "
                f"./run_all.py --profile {profile} --steps 01-04"
            )
    try:
        return open_protocol(values, root)
    except FileNotFoundError:
        raise ParameterError(f"{root} holds no answers, so nothing can have been asked about them.") from None


def open_protocol(values: Mapping[str, Any], root: Path) -> Protocol:
    """The protocol that the parameters of a judge describe, on the answers in the study's folder `root`.

    Raises ProviderError for a judge that works offline.
    """
    judge = panel.open_judge(values, root)
    if not isinstance(judge, LanguageModelJudge):
        raise ProviderError(f"judge {judge.name} is not asked over HTTP: run the study itself.")
    prompts, answers, cards = read_answers(root, values["configs"])
    plans, planted = _plans(values, prompts, answers, cards)
    store, parts = VerdictStore(store_path(root, judge.name)), {}
    for part, plan in plans.items():
        asked = asking.build_cases(plan, prompts, answers | planted, cards)
        plans[part] = asking.with_judgement_ids(judge, plan, asked)
        parts[part] = asking.all_questions(plans[part], asked, store)
    return Protocol(judge, store, parts, plans["controls"], values["judge_after_failed_gate"])


def read_answers(
    root: Path, configs: Iterable[str]
) -> tuple[pd.DataFrame, dict[tuple[str, str], str], dict[str, Card]]:
    """(test prompts, answers by configuration and prompt, cards by term) as the steps before 05_judge left them."""
    shared = root / "shared"
    prompts = pd.read_parquet(shared / "02_synth" / "artefacts" / "test_prompts.parquet")
    answers = {("reference", row.prompt_id): row.reference for row in prompts.itertuples()}
    for config in (*configs, UNTUNED):
        given = pd.read_parquet(root / config / "04_energy" / "artefacts" / "answers.parquet")
        answers |= {(config, row.prompt_id): row.answer for row in given.itertuples()}
    cards = load_cards(shared / "01_glossary" / "artefacts" / "glossary.json")
    return prompts, answers, {card.id: card for card in cards}


def _plans(
    values: Mapping[str, Any], prompts: pd.DataFrame, answers: dict[tuple[str, str], str], cards: dict[str, Card]
) -> tuple[dict[str, pd.DataFrame], dict[tuple[str, str], str]]:
    """The plans by part, and the planted texts of the gate."""
    configs, seed = values["configs"], values["seed"]
    gate, planted = planted_controls(prompts, answers, cards, configs, seed=seed)
    shares = {name: values[name] for name in ("matchings_per_prompt", "swap_share", "retest_share", "anchor_share")}
    plans = {
        "controls": gate,
        "pairs": design.plan_comparisons(prompts, configs, **shares, seed=seed),
        "rubric": design.plan_ratings(prompts, configs, share=values["rubric_share"], seed=seed),
    }
    return plans, planted
