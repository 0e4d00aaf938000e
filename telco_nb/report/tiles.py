"""The tiles of the report's first screen: each a question of a reader, its answer in large type, and its grounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from scipy.special import expit

from telco_nb.analysis.findings import PAPER
from telco_nb.analysis.recommendation import describe_config, percent
from telco_nb.analysis.statements import name_list
from telco_nb.judge.protocol import judged_prompts
from telco_nb.judge.ranking import interval_text
from telco_nb.report.config_cards import GUESSED, ordinal
from telco_nb.report.files import StudyFiles, read_or_none
from telco_nb.study.params import config_of, split_run

TAU_WORDS = {
    "yes, it tends to": "A lower loss goes with better answers more often than chance and the factors explain.",
    "no, the opposite": "A lower loss goes with worse answers.",
    "not shown": "With {n} configurations no relation of loss to quality is shown beyond what the factors can cause.",
}
CLAIM_WORDS = {"supported": "yes", "refuted": "no", "blocked": "no answer"}


class Tile(NamedTuple):
    """A box of the first screen: title, the answer in large type, lines, a warning label, and a small table.

    `good` marks the one that recommends a deployment: it alone has a green frame.
    """

    title: str
    big: str = ""
    lines: Sequence[str] = ()
    tag: str | None = None
    rows: Sequence[tuple[str, str, str]] = ()
    good: bool = False


def first_tiles(study: StudyFiles, published: StudyFiles | None = None) -> list[Tile]:
    """The tiles of a study with a finding `deploy`; the published run, if it is another, stands beside it."""
    chosen, pick = study.front_runner, (study.finding("loss_choice") or {}).get("value")
    claim = [_claim_tile(finding)] if (finding := study.finding("primary")) else []
    first = [_deploy_tile(study, chosen), _cost_tile(study, chosen, pick), *claim, _loss_tile(study, chosen, pick)]
    return [*first, _confidence_tile(study), _tau_tile(study, published), _paper_tile(study), _limits_tile(study)]


def energy_kinds(study: StudyFiles) -> list[str]:
    """The kinds of the training energies, e.g. estimated."""
    return sorted(study.results["energy_kind"].dropna().unique()) if "energy_kind" in study.results else []


def first_sentence(text: str) -> str:
    """A text up to its first full stop before a blank."""
    return f"{text.partition('. ')[0].removesuffix('.')}."


def base_models(study: StudyFiles) -> list[str]:
    """The names of the base models in the records."""
    models = {m["base_model"] for m in study.metrics.values() if m.get("base_model")}
    models |= {m["parameters"]["base_model"] for m in study.manifests.values() if m["parameters"].get("base_model")}
    return sorted(str(model) for model in models)


def _deploy_tile(study: StudyFiles, chosen: str | None) -> Tile:
    deploy = study.finding("deploy") or {}
    verdict, held = deploy.get("verdict"), [f for f in study.findings if f["id"].startswith("fitness.")]
    below = [f["statement"] for f in held if f["verdict"] == "not fit"]
    about = describe_config(study.results.loc[chosen]) if chosen else ""
    if verdict == "not fit":
        big = "none: not fit for customers" if below else "none: not shown to be fit for customers"
        ranked = [f["statement"] for f in study.findings if f["id"].startswith("floor.ranked.") and f["value"]]
        first = [f"Front-runner for a next try: {chosen} ({about})."] if chosen else []
        return Tile("Deploy", big, [*below, *ranked, *first, *_reasons(deploy)])
    if not chosen:
        return Tile("Deploy", "none of them", _reasons(deploy))
    made = [f["statement"] for f in held if f["id"] == "fitness.coverage"]
    lines = [f"{about}.", *_won(study), *made]
    if verdict == "cannot tell":
        return Tile("Deploy", f"No clear best; best guess is {chosen}", lines, "cannot tell")
    return Tile("Deploy", chosen, lines, good=True)


def _reasons(finding: Mapping[str, Any]) -> list[str]:
    """What blocks a finding, each reason a sentence."""
    return [f"{reason[:1].upper()}{reason[1:]}." for reason in finding.get("blocked_by", [])]


def _won(study: StudyFiles) -> list[str]:
    """How often the choice beats the untuned model, over the judges that may carry a claim."""
    gains = [f["value"] for f in study.findings if f["id"].startswith("gain.") and f["verdict"] != "blocked"]
    known = sorted(gain for gain in gains if gain is not None)
    shares = list(dict.fromkeys(percent(float(expit(gain))) for gain in known))
    span = " to ".join([*shares[:1], *shares[1:][-1:]])
    wins = f"Wins {span} of decided comparisons with the untuned model"
    return [f"{wins}; it was picked after the fact, so this is too high."] if shares else []


def _claim_tile(primary: Mapping[str, Any]) -> Tile:
    """The claim that was written down before the run, with its verdict."""
    lines = [primary["statement"]]
    if primary["value"] is not None:
        lead, share = f"{primary['value']:.2f}", percent(float(expit(primary["value"])))
        lines.append(f"A lead of {lead} means: the best of the others wins {share} of the decided comparisons with it.")
    return Tile("Can loss pick it?", CLAIM_WORDS.get(primary["verdict"], "cannot tell"), lines)


def _cost_tile(study: StudyFiles, chosen: str | None, pick: str | None) -> Tile:
    """Training energy, of the choice and of all, and what a million answers take."""
    title, energy, serving = "What it costs", study.results["train_energy_wh"].dropna(), study.finding("serving")
    lines = _energy_lines(study, chosen, pick) if chosen else []
    if len(energy):
        ends = dict.fromkeys(f"{end:.2g}" for end in (energy.min(), energy.max()))
        kind = " and ".join(energy_kinds(study)) or "of unknown kind"
        each = f"Training, each of the {len(energy)}" if len(ends) > 1 else "Training"
        lines.append(f"{each}: {' to '.join(ends)} Wh, {kind}.")
    lines.append(first_sentence(serving["statement"]) if serving else "What a million answers cost is not known.")
    if not chosen:
        return Tile(title, "" if len(energy) else "not known", lines)
    row = study.results.loc[chosen]
    if pd.isna(row["train_energy_wh"]):
        return Tile(title, "not known", lines)
    kind = "of unknown kind" if pd.isna(row["energy_kind"]) else row["energy_kind"]
    tag = kind if kind in (*GUESSED, "of unknown kind") else None
    return Tile(title, f"{row['train_energy_wh']:.3g} Wh to train", lines if tag else [f"It is {kind}.", *lines], tag)


def _energy_lines(study: StudyFiles, chosen: str, pick: str | None) -> list[str]:
    """The interval of the training energy of the choice, and its share of what loss's choice takes."""
    row = study.results.loc[chosen]
    if pd.isna(row["train_energy_wh"]):
        return [f"There is neither a measurement nor an estimate for training {chosen}."]
    low, high = row["train_energy_low_wh"], row["train_energy_high_wh"]
    lines = [] if pd.isna([low, high]).any() else [f"{chosen}: between {low:.3g} and {high:.3g} Wh."]
    if pick in study.results.index and pick != chosen:
        other = study.results.loc[pick]
        if other["train_energy_wh"] > 0 and other["energy_kind"] == row["energy_kind"]:
            share = row["train_energy_wh"] / other["train_energy_wh"]
            lines.append(f"{share:.2g} times what loss's choice, {pick}, takes.")
    return lines


def _confidence_tile(study: StudyFiles) -> Tile:
    confidence, title = study.finding("confidence"), "Is the front-runner better than loss's?"
    if confidence is None:
        return Tile(title, "not known", ["The analysis does not say."])
    value, lines = confidence["value"], [confidence["statement"]]
    if confidence["blocked_by"]:
        return Tile(title, "not known", lines)
    if value is None:
        return Tile(title, "nothing to decide", lines)
    word = {"supported": "yes", "refuted": "no"}.get(confidence["verdict"], "not shown")
    return Tile(title, f"{word}, {percent(value)}" if word != "not shown" else word, lines)


def _loss_tile(study: StudyFiles, chosen: str | None, pick: str | None) -> Tile:
    title = "Loss alone would have chosen"
    if not pick:
        return Tile(title, "nothing", [(study.finding("loss_choice") or {}).get("statement", "There is no loss.")])
    lines = [f"The lowest validation loss, {study.results.loc[pick, 'val_loss']:.4f}."]
    if ranks := _ranks(study, "best_loss_rank"):
        lines.append(f"Its place: {ranks}.")
    if pick == chosen:
        lines.append("It is the same configuration.")
    return Tile(title, pick, [*lines, *_strongest_effect(study, pick)])


def _strongest_effect(study: StudyFiles, pick: str) -> list[str]:
    """The factor shown to move scores most, what of it is shown on the loss, and its level in loss's choice.

    Nothing is said where no effect on a score is shown.
    """
    shown = [
        (judge, effect, effect["id"].removeprefix(start))
        for judge in study.judges
        if (start := f"effect.{judge}score.")
        for effect in study.findings
        if effect["id"].startswith(start) and effect["verdict"] == "supported"
    ]
    if not shown:
        return []
    strongest = max(shown, key=lambda one: abs(one[1]["value"]))[2]
    factor, contrast = strongest.split(".", 1)
    by = [
        f"{effect['value']:+.2f} {interval_text(_number(effect['low']), _number(effect['high']))} ({judge})"
        for judge, effect, name in shown
        if name == strongest
    ]
    name = factor.replace("_", " ")
    lines = [f"What moves scores most: {name} from {contrast.replace('->', ' to ')}, by {name_list(by)} log-odds."]
    loss = study.finding(f"effect.val_loss.{strongest}")
    if loss and loss["value"] is not None:
        word = "shows this effect too" if loss["verdict"] == "supported" else "does not clearly show this effect"
        lines.append(f"The validation loss {word} ({loss['value']:+.3f} nats per token).")
    return [*lines, f"{pick}'s {name}: {_level(study, pick, factor)}."]


def _level(study: StudyFiles, config: str, factor: str) -> str:
    level = study.results.loc[config, factor]
    return level if isinstance(level, str) else f"{level:g}"


def _ranks(study: StudyFiles, prefix: str) -> str:
    """`14th of 16 (checklist) and 13th of 16 (embedding)` from the rank findings; judges without a claim are marked."""
    findings = {judge: finding for judge in study.judges if (finding := study.finding(f"{prefix}.{judge}"))}
    ranks = [
        f"{ordinal(finding['value'])} of {finding['n']} ({_marked(judge, finding)})"
        for judge, finding in findings.items()
        if finding["value"] is not None
    ]
    return name_list(ranks)


def _marked(judge: str, finding: Mapping[str, Any]) -> str:
    return f"{judge}, no claim" if finding["verdict"] == "blocked" else judge


def _tau_tile(study: StudyFiles, published: StudyFiles | None) -> Tile:
    """The relation of loss to the rankings of the judges."""
    taus = {judge: tau for judge in study.judges if (tau := study.finding(f"tau.{judge}"))}
    known = {judge: tau for judge, tau in taus.items() if tau["value"] is not None}
    verdict = _tau_verdict(list(taus.values()))
    valid = [tau["n"] for tau in known.values() if tau["verdict"] != "blocked"]
    lines = [TAU_WORDS[verdict].format(n=min(valid))] if verdict in TAU_WORDS else []
    for judge, tau in known.items():
        interval = interval_text(_number(tau["low"]), _number(tau["high"]))
        lines.append(f"tau {tau['value']:+.2f} {interval} ({_marked(judge, tau)}).")
    if known:
        lines.append("-1: a lower loss always goes with better answers.")
    else:
        lines += [tau["statement"] for tau in taus.values()]
    return Tile("Does a lower loss go with better answers?", verdict, [*lines, *_beside_published(published)])


def _beside_published(published: StudyFiles | None) -> list[str]:
    """What the run that comes with the project, of another profile, found about loss and energy."""
    if not published:
        return []
    lowest, highest, energy = _facts_of_the_paper(published)
    return [f"Published run ({published.root.name}): lowest loss {lowest}, highest {highest}; energy {energy}."]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _tau_verdict(taus: Sequence[Mapping[str, Any]]) -> str:
    """The verdict on which all valid judges agree."""
    valid = [tau for tau in taus if tau["verdict"] not in ("blocked", "not estimable") and tau["value"] is not None]
    if not valid:
        return "cannot be told" if any(tau["verdict"] != "blocked" for tau in taus) else "no valid judge"
    signs = {0 if tau["verdict"] != "supported" else -1 if tau["value"] < 0 else 1 for tau in valid}
    words = {-1: "yes, it tends to", 0: "not shown", 1: "no, the opposite"}
    if len(signs) > 1 and len({tau["value"] < 0 for tau in valid}) == 1:  # alike, and not shown by all
        return f"shown by {sum(tau['verdict'] == 'supported' for tau in valid)} of {len(valid)} judges"
    return words[signs.pop()] if len(signs) == 1 else "the judges differ"


def _paper_tile(study: StudyFiles) -> Tile:
    low, high = PAPER["energy_wh"]
    paper = f"{PAPER['best_loss_rank']} of {PAPER['n']}", PAPER["worst_loss_rank"], f"x {high / low:.1f}"
    names = "lowest loss came", "highest loss came", "energy, most to least"
    rows = list(zip(names, paper, _facts_of_the_paper(study), strict=True))
    return Tile("Beside the paper (other model, data and judges)", rows=rows)


def _facts_of_the_paper(study: StudyFiles) -> tuple[str, str, str]:
    """Places of the lowest and the highest loss, and most to least training energy, of a study of ours."""
    ratio = study.finding("energy_ratio") or {}
    energy = (
        f"x {ratio['value']:.1f}{', no claim' * bool(ratio['blocked_by'])}" if ratio.get("value") is not None else "-"
    )
    kinds = "".join(f", {kind}" for kind in energy_kinds(study) if kind in GUESSED)
    return _ranks(study, "best_loss_rank") or "-", _ranks(study, "worst_loss_rank") or "-", f"{energy}{kinds}"


def _limits_tile(study: StudyFiles) -> Tile:
    """What the study cannot say, as far as its own files show it."""
    lines = []
    sorts = study.judges_by_sort()
    if others := [f"{sort} ({name_list(names)})" for sort, names in sorts.items() if sort != "people"]:
        people = f" beside people ({name_list(sorts['people'])})" if "people" in sorts else ", not people"
        lines.append(f"The answers were judged by {name_list(others)}{people}.")
    if asked := read_or_none(_asked, study):
        lines.append(f"{asked[0]} questions on {asked[1]} terms were asked: other questions may go otherwise.")
    if models := base_models(study):
        lines.append(f"Only {name_list(models)} was trained: nothing about other models.")
    guessed = [kind for kind in energy_kinds(study) if kind in GUESSED]
    if guessed:
        lines.append(f"Energy is {name_list(guessed)}, not measured.")
    repeated = {config_of(scope) for scope in study.scopes if split_run(scope)[1] is not None}
    if once := [config for config in study.configs if config not in repeated]:
        lines.append(f"{len(once)} of {len(study.configs)} configurations were trained once, with one seed.")
    return Tile("What this cannot say", lines=lines)


def _asked(study: StudyFiles) -> tuple[int, int]:
    """The numbers of judged questions and of their terms."""
    path = study.root / "shared" / "02_synth" / "artefacts" / "test_prompts.parquet"
    prompts = judged_prompts(pd.read_parquet(path))
    return len(prompts), prompts["term_id"].nunique()
