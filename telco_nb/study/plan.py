"""The plan of a study: which notebook runs in which scope, and what it reads from which other."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from telco_nb.study.params import ParameterError, StudyParams, declared


@dataclass(frozen=True)
class Read:
    """Files matching `pattern` in the folder of `step`, in the scopes that `scopes` stands for."""

    step: str
    scopes: str  # shared | own | configs | repeats | drift | untuned | judges
    pattern: str


@dataclass(frozen=True)
class Job:
    """One notebook in one scope. `inputs` are (step, scope, pattern) in the producer's folder."""

    step: str
    scope: str
    parameters: dict[str, Any]
    inputs: tuple[tuple[str, str, str], ...]

    @property
    def id(self) -> str:
        return f"{self.scope}/{self.step}"

    @cached_property
    def depends(self) -> tuple[str, ...]:
        """Ids of the jobs whose outputs this one reads, in order, without repetition."""
        return tuple(dict.fromkeys(f"{scope}/{step}" for step, scope, _ in self.inputs))


_TRAINED = ("metrics.json", "tables/loss_curve.parquet", "tables/val_losses.parquet", "tables/energy.parquet")
_ANSWERED = (
    "metrics.json", "tables/energy.parquet", "artefacts/answers.parquet", "tables/reference_losses.parquet",
    "tables/choices.parquet", "tables/general_losses.parquet", "tables/strengths.parquet",
)  # fmt: skip
_JUDGED = (
    "metrics.json", "artefacts/validity.json", "artefacts/judgements.parquet", "artefacts/ratings.parquet",
    "tables/ranking.parquet", "tables/score_draws.parquet", "tables/pairs.parquet", "tables/agreement.parquet",
    "tables/checks.parquet", "artefacts/points.parquet",
)  # fmt: skip

READS: dict[str, tuple[Read, ...]] = {
    "01_glossary": (),
    "02_synth": (Read("01_glossary", "shared", "artefacts/glossary.json"),),
    "03_train": (
        Read("02_synth", "shared", "artefacts/train.parquet"),
        Read("02_synth", "shared", "artefacts/val.parquet"),
    ),
    "04_energy": (
        Read("02_synth", "shared", "artefacts/test_prompts.parquet"),
        Read("02_synth", "shared", "artefacts/choices.parquet"),
        Read("03_train", "own", "artefacts/adapter/*"),
    ),
    "05_judge": (
        Read("01_glossary", "shared", "artefacts/glossary.json"),
        Read("02_synth", "shared", "artefacts/test_prompts.parquet"),
        Read("02_synth", "shared", "artefacts/train.parquet"),
        Read("04_energy", "configs", "artefacts/answers.parquet"),
        Read("04_energy", "untuned", "artefacts/answers.parquet"),
    ),
    "06_analysis": (
        Read("02_synth", "shared", "artefacts/dataset_card.json"),
        Read("02_synth", "shared", "artefacts/test_prompts.parquet"),
        *(Read("03_train", scopes, name) for scopes in ("configs", "repeats") for name in _TRAINED),
        Read("03_train", "drift", "metrics.json"),
        *(Read("04_energy", scopes, name) for scopes in ("configs", "untuned") for name in _ANSWERED),
        *(Read("05_judge", "judges", name) for name in _JUDGED),
    ),
}
STEPS = tuple(READS)
STORES = {"02_synth": "store/conversations.jsonl", "05_judge": "store/verdicts.jsonl"}  # in the folder of the scope
UNTUNED = "untuned"  # the base model itself: answers (04) but nothing to train (03)


def inputs_of(step: str, values: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """The declared reads of a step as (step, scope, pattern), given the values of its parameters."""
    scopes = {
        "shared": ["shared"],
        "own": [] if values["scope"] == UNTUNED else [values["scope"]],
        "configs": values.get("configs", []),
        "repeats": values.get("repeats", []),
        "drift": values.get("drift_runs", []),
        "untuned": [UNTUNED],
        "judges": [f"judge-{judge}" for judge in values.get("judges", [])],
    }
    return tuple((read.step, scope, read.pattern) for read in READS[step] for scope in scopes[read.scopes])


def make_job(step: str, values: dict[str, Any]) -> Job:
    """A job with the parameters that the notebook declares, taken from `values`.

    Raises ParameterError if the notebook declares a parameter that nothing gives.
    """
    names = declared(step)
    unknown = [name for name in names if name not in values]
    if unknown:
        raise ParameterError(
            f"notebooks/{step}.ipynb declares {', '.join(unknown)}, which no parameter file gives. "
            "Add it to telco_nb/study/params.py and params/base.yaml, or remove it from the notebook."
        )
    return Job(step, values["scope"], {name: values[name] for name in names}, inputs_of(step, values))


def run_order(configs: list[str], seed: int) -> list[str]:
    """The configurations in an order drawn by lot, in blocks, so that a drift of the machine looks like no factor.

    The list is cut into parts of neighbours. In a design that lists its levels in turn, neighbours share a factor's
    level. Each block takes one configuration of each part, in a random order: 16 make four blocks of four.
    """
    size, draw = math.isqrt(len(configs)), random.Random(seed)
    parts = [configs[i : i + size] for i in range(0, len(configs), size)]
    for part in parts:
        draw.shuffle(part)
    blocks = [[part[i] for part in parts if i < len(part)] for i in range(size)]
    for block in blocks:
        draw.shuffle(block)
    return [config for block in blocks for config in block]


def plan_jobs(study: StudyParams) -> list[Job]:
    """All jobs of a study in the order in which they run; that of the configurations is drawn with the study's seed.

    The configuration that shows the drift of the machine is trained first of all, and once more last of all.
    """
    scopes = [("01_glossary", "shared"), ("02_synth", "shared"), ("04_energy", UNTUNED)]
    order = run_order(study.configs, study.base["seed"])
    for config in sorted(order, key=lambda config: config != study.base["drift_config"]):
        scopes += [("03_train", config), ("04_energy", config)]
    scopes += [(step, repeat) for repeat in study.repeats for step in ("03_train", "04_energy")]
    scopes += [("03_train", run) for run in study.drift_runs]
    scopes += [("05_judge", f"judge-{judge}") for judge in study.base["judges"]]
    scopes += [("06_analysis", "study")]
    return [make_job(step, study.values(scope)) for step, scope in scopes]


def refuse_too_few(jobs: list[Job]) -> None:
    """Raise ParameterError if judges are to rank fewer than two configurations: nothing would be compared."""
    for job in jobs:
        configs = job.parameters.get("configs", [])
        if job.step in ("05_judge", "06_analysis") and len(configs) < 2:
            raise ParameterError(
                f"{job.id}: a ranking needs two configurations or more, and this study has "
                f"{', '.join(configs) or 'none'}. Name more with --configs or in configs of the profile, or leave the "
                "judges out with --steps 01-04."
            )


def unused_parameters(study: StudyParams) -> list[str]:
    """Keys of the parameter files that no notebook declares and the plan itself does not use."""
    used = {"lora_folder", "repeat_configs", "repeat_seeds", "drift_config"} | {
        name for step in STEPS for name in declared(step)
    }
    given = set(study.base).union(*study.lora.values(), *study.judge_files.values())
    return sorted(given - used)
