"""The judging protocol: the questions that a judge is asked, their order, and the headline rule.

05_judge goes through it cell by cell; the pilot, batches, votes, the price preview and `rerank` use the same code. The
id of a question is a hash of its content, so all of them share the stored verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd

from telco_nb.corpus.cards import Card, load_cards
from telco_nb.hosted import attempts
from telco_nb.hosted.api import ProviderError
from telco_nb.judge import asking, design
from telco_nb.judge.anchors import ANCHORS, anchor_texts
from telco_nb.judge.cases import Answers, Case, OfflineJudge, Question
from telco_nb.judge.gate import CONTROL_PROMPTS, GATE, gate_result, planted_controls
from telco_nb.judge.language_model import LanguageModelJudge
from telco_nb.judge.panel import open_judge
from telco_nb.judge.people import OutsideJudge, shown_pairs
from telco_nb.judge.store import VerdictStore, coverage_block, judged_rows
from telco_nb.study import params, record, seal
from telco_nb.study.content_key import is_current
from telco_nb.study.params import ParameterError
from telco_nb.study.plan import STORES, UNTUNED, plan_jobs

SHARES = ("matchings_per_prompt", "swap_share", "retest_share", "anchor_share")
SHARED_READS = (
    "shared/01_glossary/artefacts/glossary.json", "shared/02_synth/artefacts/test_prompts.parquet",
    "shared/02_synth/artefacts/train.parquet",
)  # fmt: skip
AnyJudge = TypeVar("AnyJudge", bound=OfflineJudge | LanguageModelJudge)


@dataclass(frozen=True)
class Protocol(Generic[AnyJudge]):
    """A judge, its store, and its questions by part: `controls` (the gate), `pairs`, `rubric`.

    `plans` are tables with one row per question and its `judgement_id`; `cases` are what the judge sees for each row.
    With `judge_after_failed_gate` a failed gate does not end the asking.
    """

    judge: AnyJudge
    store: VerdictStore
    plans: Mapping[str, pd.DataFrame]
    cases: Mapping[str, list[Case]]
    judge_after_failed_gate: bool

    def ask(self, part: str, progress: Callable[[int, int], None] | None = None) -> pd.DataFrame:
        """Stores the plan of a part, asks the questions without a verdict, and returns all verdicts of the part.

        `progress` is called with (number done, number of all).
        """
        self.store.plan(part, self.plans[part])
        asking.ask(self.judge, self.questions(part), self.store, progress)
        return self.judged(part)

    def judged(self, part: str) -> pd.DataFrame:
        """The readable verdicts of a part (`store.judged_rows`)."""
        return judged_rows(self.plans[part], self.store)

    def gate(self) -> dict[str, Any]:
        """The result of the gate on the verdicts so far (`gate.gate_result`)."""
        planned = set(self.plans["controls"]["control"])
        return gate_result(self.judge.name, self.judge.kind, self.judged("controls"), planned)

    def goes_on(self) -> bool:
        """True if the judge is asked more than the gate: it passed, costs nothing, or the parameters demand it."""
        return self.gate()["passed"] or self.judge.is_free or self.judge_after_failed_gate

    def questions(self, part: str) -> list[Question]:
        """All questions of a part, answered or not."""
        return asking.build_questions(self.plans[part], self.cases[part])

    @property
    def every(self) -> list[Question]:
        """All questions of all parts, each once: equal answers of two configurations can make two questions equal."""
        return list({question.id: question for part in self.plans for question in self.questions(part)}.values())

    def due(self, under_way: Collection[str] = ()) -> tuple[list[Question], str]:
        """The questions that a hosted judge may be asked now, and the reason.

        The gate comes first, then all other questions; after a failed gate only its unanswered questions. Verdicts that
        need no model are stored. `under_way` are the ids of questions in an open batch.
        """
        gate = asking.answer_by_rule(self.judge, self.questions("controls"), self.store)
        if any(question.id in under_way for question in gate):
            return [], "the gate's questions are under way; nothing more is asked before they are answered"
        if any(not self.store.attempts[question.id] for question in gate):
            return gate, "the gate first"
        result = self.gate()
        if result["passed"] or self.judge_after_failed_gate:
            waiting = asking.answer_by_rule(self.judge, self.every, self.store)
            reason = "the gate passed" if result["passed"] else "the gate failed, but judge_after_failed_gate is set"
            return [question for question in waiting if question.id not in under_way], reason
        failed = ", ".join(failed_controls(result))
        return gate, f"the gate failed ({failed}): only its unanswered questions can be asked again"


def plan_parts(
    values: Mapping[str, Any],
    prompts: pd.DataFrame,
    forms: Collection[str],
    complete: bool = False,
    anchors: Collection[str] = tuple(ANCHORS),
) -> dict[str, pd.DataFrame]:
    """The plans of pairs and rubric from the judge's parameters; without `rubric` in `forms` that plan is empty.

    `complete`: all pairs on all prompts. `anchors`: those that have answers.
    """
    shares = {name: values[name] for name in SHARES}
    share = values["rubric_share"] if "rubric" in forms else 0.0
    how = {"seed": values["seed"], "complete": complete, "anchors": [a for a in ANCHORS if a in anchors]}
    return {
        "pairs": design.plan_comparisons(prompts, values["configs"], **shares, **how),
        "rubric": design.plan_ratings(prompts, values["configs"], share=share, seed=values["seed"]),
    }


def count_questions(values: Mapping[str, Any], prompts: pd.DataFrame) -> int:
    """The largest possible number of questions, before there are answers to ask about."""
    controls = len({name.removesuffix("_ties") for name in GATE}) * min(CONTROL_PROMPTS, len(prompts))
    return controls + sum(map(len, plan_parts(values, prompts, LanguageModelJudge.forms).values()))


def build_protocol(
    judge: AnyJudge,
    store: VerdictStore,
    values: Mapping[str, Any],
    prompts: pd.DataFrame,
    answers: Answers,
    cards: Mapping[str, Card],
) -> Protocol[AnyJudge]:
    """Builds the protocol of a judge on given answers.

    Args:
        judge: the judge; the plan of one outside is what it was shown.
        store: the judge's store.
        values: the judge's parameters.
        prompts: the test prompts, one row each, as 02_synth writes them.
        answers: text by (configuration, prompt_id), with the anchors as configurations.
        cards: card by term_id.

    Raises:
        KeyError: an answer is missing; the message names configuration and prompt.
    """
    gate_plan, planted = planted_controls(prompts, answers, cards, values["configs"], seed=values["seed"])
    anchors = {config for config, _ in answers} & set(ANCHORS)
    outside = isinstance(judge, OutsideJudge)
    complete = judge.is_free and not outside
    plans = {"controls": gate_plan, **plan_parts(values, prompts, judge.forms, complete, anchors)}
    if outside:
        plans |= {part: shown_pairs(store, part) for part in ("controls", "pairs")}
    cases = {part: asking.build_cases(plan, prompts, {**answers, **planted}, cards) for part, plan in plans.items()}
    plans = {part: asking.with_judgement_ids(judge, plan, cases[part]) for part, plan in plans.items()}
    return Protocol(judge, store, plans, cases, values["judge_after_failed_gate"])


# ---------------------------------------------------------------- the headline rule


def failed_controls(gate: Mapping[str, Any]) -> list[str]:
    """The names of the planted controls on which the judge failed; `gate` is the result of `Protocol.gate`."""
    return [control["control"] for control in gate["controls"] if control["passed"] is False]


def headline_blocks(gate: Mapping[str, Any], coverage: pd.DataFrame, unrankable: str | None) -> list[str]:
    """The headline rule: a judge's ranking carries a claim only if nothing blocks it.

    Args:
        gate: the result of the gate (`Protocol.gate`).
        coverage: the table of `store.coverage_table`.
        unrankable: the reason of `bradley_terry.unrankable_reason`, or None.

    Returns:
        The reasons that block the headline; empty if there is none.
    """
    blocks = []
    if not gate["passed"]:
        blocks.append(f"failed its validity gate ({', '.join(failed_controls(gate)) or 'no result'})")
    if missing := coverage_block(coverage):
        blocks.append(missing)
    if unrankable:
        blocks.append(f"no ranking: {unrankable}")
    return blocks


# ---------------------------------------------------------------- the protocol of a study on disk


def store_path(root: Path, judge: str) -> Path:
    """The file of a judge's attempts in the study's folder `outputs/<profile>`."""
    return root / f"judge-{judge}" / STORES["05_judge"]


def open_store(root: Path, judge: str, target: Path | None = None) -> VerdictStore:
    """The store of a judge in the study's folder `root`, or for results in another folder its copy (`store_for`)."""
    return VerdictStore(attempts.store_for(root, target, store_path(root, judge).relative_to(root).as_posix()))


def open_study(
    profile: str, judge: str, params_dir: Path = params.PARAMS_DIR, *, to_ask: bool, max_usd: float | None = None
) -> Protocol[LanguageModelJudge]:
    """Opens the protocol of a hosted judge in a study that has answers.

    Args:
        profile: the study's parameter profile.
        judge: the name of a file in params/judges.
        params_dir: the folder of the parameter files.
        to_ask: new questions will be asked, so the answers must be current. Without it, old answers are allowed.
        max_usd: the most that the whole study may spend on hosted models, in dollars; None for no limit.

    Raises:
        ParameterError: there is no such judge, or no answers, or with `to_ask` the answers are out of date.
    """
    study = params.load_study(profile, params_dir)
    if judge not in study.judge_files:
        raise ParameterError(f"{params_dir / 'judges'}: no {judge}.yaml. Known: {', '.join(study.judge_files)}.")
    values = study.values(f"judge-{judge}")
    params.validate(values, f"{params_dir / 'judges' / judge}.yaml (with base.yaml and profiles/{profile}.yaml)")
    root = record.profile_root(profile)
    for job in plan_jobs(study) if to_ask else []:
        if job.step < "05" and not (checked := is_current(job, root))[0]:
            raise ParameterError(
                f"{job.id} has to run first ({checked[1]}), or the verdicts would be on other answers: "
                f"./run_all.py --profile {profile} --steps 01-04"
            )
    try:
        return open_protocol(values, root, max_usd)
    except FileNotFoundError:
        raise ParameterError(f"{root} holds no answers, so no question can have been asked about them.") from None


def open_protocol(values: Mapping[str, Any], root: Path, max_usd: float | None = None) -> Protocol[LanguageModelJudge]:
    """The protocol of a hosted judge on the answers in the study's folder `root`; see `open_study`.

    Raises ProviderError for an offline judge.
    """
    judge = open_judge(values, root, max_usd)
    if not isinstance(judge, LanguageModelJudge):
        raise ProviderError(f"judge {judge.name} is not asked over HTTP: run the study itself.")
    return build_protocol(judge, open_store(root, judge.name), values, *read_answers(root, values["configs"]))


def read_answers(
    root: Path, configs: Iterable[str]
) -> tuple[pd.DataFrame, dict[tuple[str, str], str], dict[str, Card]]:
    """Reads the outputs of the earlier steps: test prompts, answers with the anchors, and cards by term_id.

    Raises RecordError if one is not as its step has written it, FileNotFoundError if one is missing.
    """
    configs = [*configs, UNTUNED]
    made = root / "shared" / "02_synth" / "artefacts"
    answered = [f"{config}/04_energy/artefacts/answers.parquet" for config in configs]
    seal.require_unchanged(root, *SHARED_READS, *answered)
    prompts = judged_prompts(record.read_table(made / "test_prompts.parquet"))
    (glossary := root / SHARED_READS[0]).stat()
    cards = {card.id: card for card in load_cards(glossary)}
    train = record.read_table(made / "train.parquet", columns=["messages"])
    answers = anchor_texts(prompts, cards, train)
    for config in configs:
        table = record.read_table(
            root / config / "04_energy" / "artefacts" / "answers.parquet", ["prompt_id", "answer"]
        )
        answers |= {(config, i): text for i, text in zip(table["prompt_id"], table["answer"], strict=True)}
    return prompts, answers, cards


def judged_prompts(prompts: pd.DataFrame) -> pd.DataFrame:
    """The prompts that can be judged: prompts of one's own need a term and a gold answer."""
    known = (prompts["term_id"] != "") & (prompts["reference"] != "")
    return prompts[known].reset_index(drop=True)
