"""Parameter files: strict loading, merging and checking, before any kernel starts.

`base.yaml` + `profiles/<profile>.yaml` + one `<lora_folder>/<config>.yaml` or `judges/<judge>.yaml` give the flat set
of values that notebooks receive. Merging is by key. Every fault names the file, the key and the fix.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from telco_nb import ROOT
from telco_nb.study.input_files import InputFileError, read_json, read_yaml, text_fault

PARAMS_DIR = ROOT / "params"
NOTEBOOKS_DIR = ROOT / "notebooks"
URL = re.compile(r"[a-z][a-z0-9+.-]+:/")  # as a path shows it: s3://bucket is s3:/bucket
IS_URL = "this is a URL, and a step is finished by renames, which need a folder. Copy a finished study there."
Share = Field(ge=0, le=1)


class ParameterError(InputFileError):
    """A parameter file or value cannot be used; the message names where, what and the fix."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_Model = TypeVar("_Model", bound=_Strict)


class LoraParameters(_Strict):
    """The parameters that one configuration may set: a file of `params/lora`. `seed` may stand there as well."""

    target_modules: Literal["qv", "attention", "mlp", "all"]
    rank: int = Field(ge=1, le=1024)
    lora_alpha: int = Field(ge=1)
    lora_dropout: float = Field(ge=0, lt=1)
    rslora: bool
    dora: bool
    bias: Literal["none", "lora_only", "all"]
    layers_to_transform: list[int] | None
    quantization: Literal["none", "int8", "nf4"]
    epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0, lt=1)
    lr_scheduler: Literal["linear", "cosine", "constant_with_warmup"]
    warmup_share: float = Share
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    batch_tokens: int = Field(ge=64)
    micro_batch_tokens: int | None = Field(ge=32)
    max_length: int = Field(ge=32)
    assistant_only_loss: bool
    gradient_checkpointing: bool
    dtype: Literal["auto", "float32", "bfloat16"]


class JudgeParameters(_Strict):
    """The parameters that one judge may set: a file of `params/judges`."""

    judge: str
    judge_kind: Literal[
        "checklist", "embedding", "human", "language_model_panel", "anthropic", "openai", "google", "openai-compatible"
    ]
    judge_model: str | None
    judge_endpoint: str | None
    judge_max_tokens: int = Field(ge=64)
    judge_temperature: float | None = Field(ge=0, le=2)
    judge_structured: Literal["native", "prompted"]
    judge_timeout_s: float = Field(gt=0)
    judge_input_usd_per_mtok: float | None = Field(ge=0)
    judge_output_usd_per_mtok: float | None = Field(ge=0)
    matchings_per_prompt: int = Field(ge=1)
    swap_share: float = Share
    retest_share: float = Share
    anchor_share: float = Share
    rubric_share: float = Share
    judge_after_failed_gate: bool


class Parameters(LoraParameters, JudgeParameters):
    """Every parameter of the study. No defaults here: `params/base.yaml` holds them, with their meaning."""

    # which study, which part of it
    profile: str
    scope: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    lora_folder: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    configs: list[str] = Field(min_length=1)
    repeats: list[str]
    repeat_configs: list[str]
    repeat_seeds: list[int]
    judges: list[str] = Field(min_length=1)
    seed: int = Field(ge=0)
    # data
    glossary_path: str
    contexts_path: str
    gold_path: str | None
    reviews_path: str | None
    noisy_path: str | None
    prompts_path: str | None
    unseen_terms: list[str]
    generator: Literal["offline", "anthropic", "openai", "google", "openai-compatible"]
    generator_model: str | None
    generator_endpoint: str | None
    generator_max_tokens: int = Field(ge=64)
    generator_temperature: float | None = Field(ge=0, le=2)
    generator_structured: Literal["native", "prompted"]
    generator_timeout_s: float = Field(gt=0)
    generator_input_usd_per_mtok: float | None = Field(ge=0)
    generator_output_usd_per_mtok: float | None = Field(ge=0)
    max_in_flight: int = Field(ge=1, le=200)
    conversations_per_scenario: int = Field(ge=1, le=20)
    train_conversations: int | None = Field(ge=1)
    val_conversations: int | None = Field(ge=1)
    max_exchanges: int | None = Field(ge=1)
    test_prompts: int | None = Field(ge=1)
    noisy_prompts: int | None = Field(ge=0)
    unseen_prompts: int | None = Field(ge=0)
    choice_items: int | None = Field(ge=1)
    general_path: str | None
    # training
    base_model: str = Field(min_length=1)
    base_model_revision: str | None = Field(min_length=1)
    device: Literal["auto", "cpu", "cuda"]
    fused_step: bool
    record_step: bool
    processes: int = Field(ge=1, le=64)
    checkpoint_seconds: float = Field(gt=0)
    # answering
    answer_max_tokens: int = Field(ge=8)
    answer_batch_size: int = Field(ge=1)
    answer_temperature: float = Field(ge=0)
    adapter_strengths: list[Annotated[float, Field(ge=0, le=4)]] = Field(min_length=1)
    # energy
    cpu_watts_per_core_low: float = Field(gt=0)
    cpu_watts_per_core: float = Field(gt=0)
    cpu_watts_per_core_high: float = Field(gt=0)
    idle_share: float = Share
    idle_seconds: float = Field(ge=0)
    cool_down_celsius: float | None = Field(gt=0)
    drift_config: str | None
    drift_runs: list[str]
    external_wh: float | None = Field(gt=0)
    usd_per_kwh: float = Field(ge=0)
    carbon_g_per_kwh: float = Field(ge=0)
    carbon_source: str = Field(min_length=1)
    pue: float = Field(ge=1)
    # ranking and claims
    bootstrap_draws: int = Field(ge=100)
    claims_path: str


class Claims(_Strict):
    """What is claimed, written down before the run: a file such as `params/claims.yaml`, which holds the meanings."""

    claim: str = Field(min_length=1)
    rule: str = Field(min_length=1)
    outcome: Literal["judged_quality"]
    margin: float = Field(gt=0, le=3)
    confidence: float = Field(ge=0.8, lt=1)
    tie: float = Field(ge=0)
    energy_saving: float = Field(ge=0, lt=1)


def repeat_name(config: str, seed: int) -> str:
    """The run of a configuration with another seed: `c06-seed1`. `split_run` takes it apart."""
    return f"{config}-seed{seed}"


def drift_name(config: str) -> str:
    """The run of a configuration that is trained once more at the end, with the same seed: `c01-drift`."""
    return f"{config}-drift"


def split_run(run: str) -> tuple[str, int | None]:
    """The configuration of a run and the seed of a repeat: (`c06`, 1) for `c06-seed1`, (`c06`, None) for `c06`.

    A run for the drift of the machine, `c06-drift`, has the seed of the configuration: (`c06`, None).
    """
    found = re.fullmatch(r"(.+)-seed(-?\d+)", run)
    if found:
        return found[1], int(found[2])
    return (run if run.startswith("judge-") else run.removesuffix("-drift")), None


def config_of(run: str) -> str:
    """The configuration of a run: `c06` for `c06` and for `c06-seed1`."""
    return split_run(run)[0]


@dataclass(frozen=True)
class StudyParams:
    """The resolved files of one profile: `base` for all steps, one override per configuration and per judge."""

    profile: str
    base: dict[str, Any]
    lora: dict[str, dict[str, Any]]
    judge_files: dict[str, dict[str, Any]]
    configs: list[str] = field(default_factory=list)

    @cached_property
    def repeats(self) -> list[str]:
        """Scopes of the seed repeats, `<config>-seed<seed>`, for the repeated configurations in `configs`."""
        configs = set(self.configs)
        repeated = [c for c in self.base["repeat_configs"] if c in configs]
        return [repeat_name(config, seed) for config in repeated for seed in self.base["repeat_seeds"]]

    @property
    def drift_runs(self) -> list[str]:
        """The scope of the training that shows the drift of the machine; empty without a `drift_config`."""
        config = self.base["drift_config"]
        return [drift_name(config)] if config in self.configs else []

    def values(self, scope: str) -> dict[str, Any]:
        """All parameter values for one scope (`shared`, `c01`, `c01-seed1`, `untuned`, `judge-x`, `study`)."""
        merged = {**self.base, "scope": scope, "configs": self.configs, "repeats": self.repeats}
        merged |= {"drift_runs": self.drift_runs}
        merged |= {"external_wh": None}  # only typed into a notebook that is run by hand
        config, seed = split_run(scope)
        if config in self.lora:
            merged |= self.lora[config] | ({} if seed is None else {"seed": seed})
        if scope.startswith("judge-"):
            merged |= self.judge_files[scope.removeprefix("judge-")]
            if merged["judge_kind"] not in VOTED_KINDS:  # voters were shown the first run of each configuration
                merged["configs"] = [*self.configs, *self.repeats]
        return merged


VOTED_KINDS = ("human", "language_model_panel")
LORA_KEYS = {*LoraParameters.model_fields, "seed"}
JUDGE_KEYS = {*JudgeParameters.model_fields}
# What else stands where a configuration's name can stand: other folders of a study, the anchors, and a tied verdict.
RESERVED_NAMES = {
    "shared", "study", "report", "untuned", "votes", "store", "reference", "gold", "template", "echo", "nearest", "tie",
}  # fmt: skip
PUBLISHED = "reference"  # the folder of outputs that holds the published run
BY_HAND = "by-hand"  # the folder of outputs for results of notebooks that are run by hand
OFFLINE_KINDS = {"checklist", "embedding", "human", "language_model_panel"}
# Never written in a file: what the plan computes, and a wall meter's figure, which is known after a training by hand.
RUNNER_KEYS = {"scope", "repeats", "drift_runs", "external_wh"}


def load_study(profile: str, params_dir: Path = PARAMS_DIR, configs: Iterable[str] | None = None) -> StudyParams:
    """Read and check every parameter file of a profile.

    Raises ParameterError for an unknown key, a wrong type, a YAML trap, a missing file, a missing value or two
    configurations that are the same.
    """
    base = _read_file(params_dir / "base.yaml", set(Parameters.model_fields) - RUNNER_KEYS)
    check_profile_name(profile)
    profile_file = params_dir / "profiles" / f"{profile}.yaml"
    base |= _read_file(profile_file, set(Parameters.model_fields) - RUNNER_KEYS) | {"profile": profile}
    computed = {"scope": "shared", "repeats": [], "drift_runs": [], "external_wh": None}
    validate(base | computed, f"{profile_file} (with base.yaml)")
    folder = base["lora_folder"]
    lora = {p.stem: _read_file(p, LORA_KEYS) for p in sorted((params_dir / folder).glob("*.yaml"))}
    _check_names(lora, params_dir / folder)
    judges = {p.stem: _read_file(p, JUDGE_KEYS) for p in sorted((params_dir / "judges").glob("*.yaml"))}
    for key, names, known, place in (
        ("configs", base["configs"], lora, folder),
        ("repeat_configs", base["repeat_configs"], lora, folder),
        ("drift_config", [name for name in [base["drift_config"]] if name], lora, folder),
        ("judges", base["judges"], judges, "judges"),
    ):
        for name in names:
            if name not in known:
                raise ParameterError(
                    f"{profile_file}: {key}: there is no {params_dir / place / name}.yaml. "
                    f"Known: {', '.join(known) or 'none'}."
                )
    study = StudyParams(profile, base, lora, judges, list(configs or base["configs"]))
    _refuse_duplicates(study, params_dir)
    _check_all(study, params_dir)
    return study


def check_profile_name(profile: str) -> None:
    """Raise ParameterError if a profile's name could lead out of the outputs folder, or to the published run."""
    if not re.fullmatch(r"[\w-]{1,100}", profile) or profile in (PUBLISHED, BY_HAND):
        raise ParameterError(
            f"--profile {profile[:100]!r}: the name of a profile has letters, digits, _ and - only, and is not "
            f"{PUBLISHED!r} or {BY_HAND!r}: these folders of outputs hold something else. Name a file of "
            "params/profiles."
        )


def given_path(path: str | Path, option: str) -> Path:
    """The absolute path that an option means. Raises ParameterError, naming the option, if there can be none."""
    try:
        fault = text_fault(str(path)) or (IS_URL if URL.match(str(path)) else "")
        absolute = Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link loop, an unknown user, a NUL
        fault, absolute = f"{str(error).rstrip('.')}.", Path()
    if fault:
        name = str(path)[:200].encode("ascii", "backslashreplace").decode()
        raise ParameterError(f"{option} {name}: {fault} Name another place.")
    return absolute


def _check_names(names: Iterable[str], folder: Path) -> None:
    """Refuse names of configurations that a study uses itself, or that cannot be the name of a folder everywhere."""
    for name in names:
        where = f"{folder / name}.yaml: a configuration cannot be called {name!r}"
        if name in RESERVED_NAMES or "-seed" in name or name.endswith("-drift") or name.startswith("judge-"):
            raise ParameterError(f"{where}: the study uses that name itself. Rename the file.")
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
            raise ParameterError(f"{where}: a name has small letters, digits and - only. Rename the file.")


def _check_all(study: StudyParams, params_dir: Path) -> None:
    scopes = {"shared": "base.yaml"} | {c: f"{study.base['lora_folder']}/{c}.yaml" for c in study.lora}
    scopes |= dict.fromkeys([*study.repeats, *study.drift_runs], "base.yaml")
    scopes |= {f"judge-{j}": f"judges/{j}.yaml" for j in study.base["judges"]}
    one = {"configs": study.configs[:1]}  # the whole list was checked with the base: not again for each of its names
    for scope, name in scopes.items():
        validate(study.values(scope) | one, f"{params_dir / name} (with base.yaml and profiles/{study.profile}.yaml)")
    for judge in study.base["judges"]:
        where, values = f"{params_dir / 'judges' / judge}.yaml", study.values(f"judge-{judge}")
        if study.judge_files[judge].get("judge") != judge:
            raise ParameterError(f"{where}: judge: must equal the file name, {judge!r}.")
        if values["judge_kind"] in OFFLINE_KINDS and values["judge_endpoint"] is not None:
            raise ParameterError(f"{where}: judge_endpoint: a {values['judge_kind']} judge works offline. Remove it.")
    for name in [name for name in Parameters.model_fields if name.endswith("_path") and name != "claims_path"]:
        value = study.base[name]
        if value is not None and not os.path.exists(ROOT / value):  # noqa: PTH110 - raises for a name that is too long
            raise ParameterError(f"{params_dir}: {name}: {value!r:.200} does not exist below {ROOT}. Correct the path.")
    load_claims(study.base["claims_path"])


def _refuse_duplicates(study: StudyParams, params_dir: Path) -> None:
    for key in ("configs", "judges", "repeat_configs", "repeat_seeds"):
        values = study.configs if key == "configs" else study.base[key]
        doubled = sorted(str(value) for value, count in Counter(values).items() if count > 1)
        if doubled:
            raise ParameterError(f"{params_dir}: {key}: {', '.join(doubled)} is listed twice. Remove one of them.")
    seen: dict[str, str] = {}
    for config, override in study.lora.items():
        text = json.dumps(override, sort_keys=True)
        if text in seen:
            raise ParameterError(
                f"{params_dir / study.base['lora_folder'] / config}.yaml: the same configuration as {seen[text]}.yaml. "
                "Change a value or delete one of the files."
            )
        seen[text] = config


@cache
def claims_path_of(profile: str) -> str:
    """The file of claims that a profile names; that of base.yaml for a profile that has no file here."""
    known = set(Parameters.model_fields) - RUNNER_KEYS
    path = PARAMS_DIR / "profiles" / f"{profile}.yaml"
    own = _read_file(path, known) if path.is_file() else {}
    return str((_read_file(PARAMS_DIR / "base.yaml", known) | own)["claims_path"])


def load_claims(path: str | Path = "params/claims.yaml") -> Claims:
    """Read the claims of a study strictly; a relative path is below the project's folder.

    Raises ParameterError for an unknown key, a missing one, a wrong value, or a tie wider than the margin.
    """
    file = ROOT / path
    claims = _checked(Claims, _read_file(file, set(Claims.model_fields)), str(file))
    if claims.tie > claims.margin:
        raise ParameterError(f"{file}: tie: {claims.tie} is more than the margin, {claims.margin}. Make it smaller.")
    return claims


def _checked(model: type[_Model], values: dict[str, Any], where: str) -> _Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        fix = _fix(first) if first["type"] != "missing" or model is Parameters else "no value is given. Add the key."
        raise ParameterError(f"{where}: {key}: {fix}") from None


def validate(values: dict[str, Any], where: str) -> Parameters:
    """Validate a whole set of values. Raises ParameterError naming `where`, the key and what is expected."""
    checked = _checked(Parameters, values, where)
    watts = (checked.cpu_watts_per_core_low, checked.cpu_watts_per_core, checked.cpu_watts_per_core_high)
    if list(watts) != sorted(watts):
        raise ParameterError(f"{where}: cpu_watts_per_core: low <= mid <= high is needed, got {watts}.")
    return checked


def _fix(error: ErrorDetails) -> str:
    if error["type"] == "missing":
        return "no value is given. Add the key to params/base.yaml or to the profile."
    if error["type"] == "extra_forbidden":
        return "unknown key. Remove it or correct its spelling."
    return f"{error['msg']}, got {error['input']!r}. Correct the value."


def _read_file(path: Path, allowed: set[str]) -> dict[str, Any]:
    """One flat YAML mapping, with PyYAML's silent traps refused."""
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ParameterError(f"{path}: no such file. Files there: {known or 'none'}.")

    def check(node: yaml.Node) -> None:
        for key_node, value_node in node.value if isinstance(node, yaml.MappingNode) else ():
            where = f"{path}:{key_node.start_mark.line + 1}: {key_node.value}"
            if key_node.value not in allowed:
                raise ParameterError(f"{where}: unknown key here. Allowed: {', '.join(sorted(allowed))}.")
            _refuse_traps(value_node, where)

    try:
        values = read_yaml(path, check)
    except InputFileError as error:
        raise ParameterError(str(error)) from None
    if not isinstance(values, dict):
        raise ParameterError(f"{path}: a mapping of `key: value` lines is expected.")
    return values


_TRAPS = (
    (re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+|[-+]?\d[\d_]*\.[\d_]*[eE]\d+|[-+]?\.\d+[eE]\d+"),
     lambda t: f"YAML reads {t} as text, not as a number. Write {_float_text(t)}."),
    (re.compile(r"yes|no|on|off", re.I),
     lambda t: f"YAML reads {t} as true or false. Write true or false, or quote it to mean text."),
    (re.compile(r"[-+]?0[\d_]+"),
     lambda t: f"YAML reads {t} as an octal number. Write {t.lstrip('+-0_') or '0'} without the leading zero."),
    (re.compile(r"[-+]?\d+(:\d+)+"),
     lambda t: f"YAML reads {t} as a base-60 number. Quote it to mean text."),
)  # fmt: skip


def _float_text(text: str) -> str:
    mantissa, _, exponent = text.lower().partition("e")
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{mantissa}e{exponent if exponent[0] in '+-' else '+' + exponent}"


def _refuse_traps(node: yaml.Node, where: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_traps(item, where)
    elif isinstance(node, yaml.MappingNode):
        raise ParameterError(f"{where}: nested values are not used here. Write flat keys.")
    elif isinstance(node, yaml.ScalarNode) and not node.style:  # plain, that is: unquoted
        for pattern, message in _TRAPS:
            if pattern.fullmatch(node.value):
                raise ParameterError(f"{where}: {message(node.value[:40])}")


def parameters_cell(notebook: Path) -> str:
    """Source of the notebook's cell tagged `parameters`. Raises ParameterError if there is not exactly one."""
    try:
        cells = read_json(notebook, control_characters=True)["cells"]  # outputs may hold colours of a terminal
        tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    except (InputFileError, KeyError, TypeError, AttributeError) as error:
        raise ParameterError(f"{notebook}: no notebook can be read here: {error!s:.200}. Restore the file.") from None
    if len(tagged) != 1:
        raise ParameterError(f"{notebook}: {len(tagged)} cells are tagged `parameters`; exactly one is needed.")
    return "".join(tagged[0]["source"])


@cache
def declared(step: str, notebooks_dir: Path = NOTEBOOKS_DIR) -> dict[str, Any]:
    """Names and default values of the parameters that a notebook declares (read, not executed)."""
    notebook = notebooks_dir / f"{step}.ipynb"
    if not notebook.is_file():
        raise ParameterError(f"{notebook}: no such notebook.")
    values = {}
    for statement in ast.parse(parameters_cell(notebook)).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if _is_literal(value):
                values[name] = ast.literal_eval(value)
            case _:
                where = f"{notebook}: parameters cell, line {statement.lineno}"
                raise ParameterError(f"{where}: only `name = literal` lines are allowed.")
    return values


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True
