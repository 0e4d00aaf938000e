"""The judging protocol, written once: which questions a judge is asked, in which order, and what its answers may carry.

05_judge goes through it cell by cell; the pilot, batches, votes, the price preview and `rerank` use the same object.
A question's id is a hash of all that it says, so what one of them has asked no other asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from telco_nb.corpus.cards import Card, load_cards
from telco_nb.hosted.api import ProviderError
from telco_nb.judge import asking, design
from telco_nb.judge.cases import Case, Judge, Question
from telco_nb.judge.gate import CONTROL_PROMPTS, GATE, gate_result, planted_controls
from telco_nb.judge.language_model import LanguageModelJudge
from telco_nb.judge.panel import open_judge
from telco_nb.judge.people import shown_pairs
from telco_nb.judge.store import VerdictStore, coverage_block, judged_rows
from telco_nb.study import params, record
from telco_nb.study.content_key import is_current
from telco_nb.study.params import ParameterError
from telco_nb.study.plan import UNTUNED, plan_jobs

SHARES = ("matchings_per_prompt", "swap_share", "retest_share", "anchor_share")


@dataclass(frozen=True)
class Protocol:
    """A judge, its store, and what it is asked, by part: `controls` (the gate), `pairs`, `rubric`.

    `plans` are tables with a row per question and its `judgement_id`, `cases` what the judge sees for each row.
    `insists`: a failed gate does not end the asking (parameter judge_after_failed_gate).
    """

    judge: Judge
    store: VerdictStore
    plans: Mapping[str, pd.DataFrame]
    cases: Mapping[str, list[Case]]
    insists: bool = False

    def ask(self, part: str, progress: Callable[[int, int], None] | None = None) -> pd.DataFrame:
        """Note the plan of a part in the store, ask what the store does not answer yet, and return the verdicts."""
        self.store.plan(part, self.plans[part])
        asking.ask(self.judge, asking.open_questions(*self._part(part), self.store), self.store, progress)
        return self.judged(part)

    def judged(self, part: str) -> pd.DataFrame:
        """The readable verdicts of a part (`store.judged_rows`)."""
        return judged_rows(self.plans[part], self.store)

    def gate(self) -> dict[str, Any]:
        """The result of the gate, as far as its questions are answered (`gate.gate_result`)."""
        return gate_result(self.judge.name, self.judge.kind, self.judged("controls"))

    def goes_on(self) -> bool:
        """Whether the judge is asked more than the gate: it passed, or costs nothing, or the parameters insist."""
        return self.gate()["passed"] or self.judge.is_free or self.insists

    def questions(self, part: str) -> list[Question]:
        """All questions of a part, answered or not."""
        return asking.all_questions(*self._part(part), self.store)

    @property
    def every(self) -> list[Question]:
        """Each question once: two configurations that answer alike can make one question of two."""
        return list({question.id: question for part in self.plans for question in self.questions(part)}.values())

    def due(self, under_way: Collection[str] = ()) -> tuple[list[Question], str]:
        """(what a hosted judge may be asked now, why that): the gate, then the rest; after a failed gate what it lacks.

        Verdicts that need no model are stored. `under_way`: ids of questions that were asked and not answered yet.
        """
        gate = self._unanswered(self.questions("controls"))
        if any(question.id in under_way for question in gate):
            return [], "the gate's questions are under way; nothing more is asked before they are answered"
        if any(not self.store.attempts[question.id] for question in gate):
            return gate, "the gate first"
        found = self.gate()
        if found["passed"] or self.insists:
            waiting = [question for question in self._unanswered(self.every) if question.id not in under_way]
            return waiting, "the gate passed" if found["passed"] else "the gate failed, and is told not to matter"
        failed = ", ".join(failed_controls(found))
        return gate, f"the gate failed ({failed}): only what it has no answer to can be asked again"

    def _part(self, part: str) -> tuple[pd.DataFrame, list[Case]]:
        return self.plans[part], self.cases[part]

    def _unanswered(self, questions: Iterable[Question]) -> list[Question]:
        waiting = [question for question in questions if question.id not in self.store.ok]
        return asking.store_by_rule(self.judge, waiting, self.store)


def plan_parts(values: Mapping[str, Any], prompts: pd.DataFrame, forms: Collection[str]) -> dict[str, pd.DataFrame]:
    """The plans of pairs and rubric from the judge's parameters, for a judge that can be asked these `forms`."""
    shares = {name: values[name] for name in SHARES}
    share = values["rubric_share"] if "rubric" in forms else 0.0
    return {
        "pairs": design.plan_comparisons(prompts, values["configs"], **shares, seed=values["seed"]),
        "rubric": design.plan_ratings(prompts, values["configs"], share=share, seed=values["seed"]),
    }


def count_questions(values: Mapping[str, Any], prompts: pd.DataFrame) -> int:
    """How many questions the protocol has at most, before there are answers to ask about."""
    controls = len({name.removesuffix("_ties") for name in GATE}) * min(CONTROL_PROMPTS, len(prompts))
    return controls + sum(map(len, plan_parts(values, prompts, LanguageModelJudge.forms).values()))


def build_protocol(
    judge: Judge,
    store: VerdictStore,
    values: Mapping[str, Any],
    prompts: pd.DataFrame,
    answers: Mapping[tuple[str, str], str],
    cards: Mapping[str, Card],
) -> Protocol:
    """The protocol of a judge on given answers.

    Args:
        judge: who is asked; a person's plan is what the blind panel showed.
        store: where its verdicts are and will be kept.
        values: the judge's parameters.
        prompts: the test prompts, one row each, as 02_synth writes them.
        answers: text by (configuration, prompt_id); the anchors `untuned` and `reference` among the configurations.
        cards: card by term_id.

    Raises:
        KeyError: an answer is missing; the message names configuration and prompt.
    """
    gate_plan, planted = planted_controls(prompts, answers, cards, values["configs"], seed=values["seed"])
    plans = {"controls": gate_plan, **plan_parts(values, prompts, judge.forms)}
    if judge.kind == "human":
        plans |= {part: shown_pairs(store, part) for part in ("controls", "pairs")}
    made = {part: asking.build_cases(plan, prompts, {**answers, **planted}, cards) for part, plan in plans.items()}
    plans = {part: asking.with_judgement_ids(judge, plan, made[part]) for part, plan in plans.items()}
    return Protocol(judge, store, plans, made, values["judge_after_failed_gate"])


# ---------------------------------------------------------------- what a judge's answers may carry


def failed_controls(gate: Mapping[str, Any]) -> list[str]:
    """Names of the planted controls on which the judge failed."""
    return [control["control"] for control in gate["controls"] if not control["passed"]]


def headline_blocks(gate: Mapping[str, Any], coverage: pd.DataFrame, unrankable: str | None) -> list[str]:
    """The headline rule: why this judge's ranking may not carry a claim, one reason each; empty if it may.

    `gate` is the gate's result, `coverage` the table of `store.coverage_table`, `unrankable` the reason of
    `bradley_terry.unrankable_reason`.
    """
    blocks = []
    if not gate["passed"]:
        blocks.append(f"failed its validity gate ({', '.join(failed_controls(gate)) or 'no result'})")
    if missing := coverage_block(coverage):
        blocks.append(missing)
    if unrankable:
        blocks.append(f"no ranking: {unrankable}")
    return blocks


# ---------------------------------------------------------------- from the study's folder, outside the notebook


def store_path(root: Path, judge: str) -> Path:
    """Where the attempts of a judge are kept, in the study's folder."""
    return root / f"judge-{judge}" / "store" / "verdicts.jsonl"


def open_study(
    profile: str, judge: str, params_dir: Path = params.PARAMS_DIR, *, to_ask: bool, max_usd: float | None = None
) -> Protocol:
    """The protocol of a hosted judge of params/judges in a study whose answers are there.

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
        return open_protocol(values, root, max_usd)
    except FileNotFoundError:
        raise ParameterError(f"{root} holds no answers, so nothing can have been asked about them.") from None


def open_protocol(values: Mapping[str, Any], root: Path, max_usd: float | None = None) -> Protocol:
    """The protocol of a hosted judge on the answers in the study's folder `root`.

    Raises ProviderError for a judge that works offline.
    """
    judge = open_judge(values, root, max_usd)
    if not isinstance(judge, LanguageModelJudge):
        raise ProviderError(f"judge {judge.name} is not asked over HTTP: run the study itself.")
    store = VerdictStore(store_path(root, judge.name))
    return build_protocol(judge, store, values, *read_answers(root, values["configs"]))


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
