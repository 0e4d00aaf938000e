"""A plausible outputs tree with a planted truth, written through the real record, so that analysis and report can be
tested without training anything. Numbers are made up; the files are what the steps write."""

from __future__ import annotations

import base64
import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from telco_nb import ROOT, notebook
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.judge import cases
from telco_nb.judge.anchors import FLOORS, GOLD
from telco_nb.notebook import Run
from telco_nb.study import record
from telco_nb.study.params import config_of
from telco_nb.study.plan import Job

SCRIPT = "<script>document.title='owned';fetch('https://example.com/x')</script><img src=x onerror=alert(1)>"
PNG = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c626001000000ffff03"
        "000006000557bfabd40000000049454e44ae426082"
    )
).decode()


def design(n: int = 16) -> pd.DataFrame:
    """n configurations: the first 16 are the orthogonal array, beyond that the full factorial with more ranks."""
    rows = []
    for a, b, c, d in product((-1, 1), repeat=4):
        target = ("qv", "attention", "mlp", "all")[(a > 0) * 2 + (b > 0)]
        rows.append((target, 8 if c < 0 else 64, 1 if d < 0 else 4, 2e-4 if a * b * c * d < 0 else 1e-3))
    extra = product(("qv", "attention", "mlp", "all"), (4, 16, 32, 128), (1, 2, 3, 4), (1e-4, 5e-4, 2e-3, 4e-3))
    rows = (rows + list(extra))[:n]
    frame = pd.DataFrame(rows, columns=["target_modules", "rank", "epochs", "learning_rate"])
    frame.insert(2, "lora_alpha", 2 * frame["rank"])
    width = max(2, len(str(n)))
    frame.index = pd.Index([f"c{k + 1:0{width}d}" for k in range(n)], name="config")
    return frame


def truth(configs: pd.DataFrame, seed: int = 7) -> pd.DataFrame:
    """Planted loss, quality (log-odds) and energy (Wh) of each configuration."""
    rng = np.random.default_rng(seed)
    size = configs["target_modules"].map({"qv": 1.0, "attention": 1.02, "mlp": 1.05, "all": 1.09})
    loss = 0.62 - 0.05 * (configs["epochs"] > 1) - 0.04 * (configs["learning_rate"] > 4e-4) - 0.02 * (size - 1) / 0.09
    quality = 0.7 * (size - 1) / 0.09 + 0.25 * (configs["rank"] > 8) + 0.45 * (configs["epochs"] == 1)
    return pd.DataFrame(
        {
            "loss": loss + rng.normal(0, 0.008, len(configs)),
            "quality": quality - quality.mean() + rng.normal(0, 0.1, len(configs)),
            "energy": 0.11 * configs["epochs"] ** 0.93 * size * rng.normal(1, 0.02, len(configs)),
        },
        index=configs.index,
    )


def make_judge(score: pd.Series, noise: float = 0.1, name: str = "checklist", **facts: Any) -> JudgeResults:
    """A judge with the given scores and draws around them; `facts` are other fields."""
    rng = np.random.default_rng(3)
    draws = pd.DataFrame(score.to_numpy() + rng.normal(0, noise, (400, len(score))), columns=score.index)
    ranking = pd.DataFrame({"score": score, "low": draws.quantile(0.025), "high": draws.quantile(0.975)})
    ranking["rank"] = ranking["rank_low"] = ranking["rank_high"] = score.rank(ascending=False)
    ranking["is_anchor"], ranking["n_terms"] = False, 10_000  # so many that standard errors count as known
    known = {"kind": name, "gate_passed": True, "coverage": 1.0, "headline_blocks": ()} | facts
    return JudgeResults(name=name, ranking=ranking, draws=draws, **known)


def make_study(n: int = 16, judges: list[JudgeResults] | None = None, **columns: Any) -> StudyResults:
    """Results of `design(n)` with the planted truth, in memory; `columns` replace columns of the results."""
    configs = design(n)
    planted = truth(configs)
    results = configs.assign(
        seed=1,
        val_loss=planted["loss"],
        val_loss_low=planted["loss"] - 0.01,
        val_loss_high=planted["loss"] + 0.01,
        train_energy_wh=planted["energy"],
        train_energy_low_wh=planted["energy"] / 2,
        train_energy_high_wh=planted["energy"] * 2,
        energy_kind="estimated",
    ).assign(**columns)
    rng = np.random.default_rng(4)
    draws = pd.DataFrame(results["val_loss"].to_numpy() + rng.normal(0, 0.005, (400, n)), columns=configs.index)
    panel = [make_judge(planted["quality"])] if judges is None else judges
    repeats = pd.DataFrame({"config": [], "seed": [], "val_loss": [], "train_energy_wh": []})
    return StudyResults(results, draws, panel, repeats)


def flip(path: Path, place: int = -1) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def write_again(root: Path, scope: str, step: str) -> None:
    """Let the record of a step be one that has written the files which are in its folder now."""
    folder = record.step_dir(root, scope, step)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [folder / output["path"] for output in manifest["outputs"] if (folder / output["path"]).is_file()]
    facts = [{"sha256": record.sha256(path), "bytes": path.stat().st_size} for path in files]
    outputs = [{"path": str(f.relative_to(folder))} | fact for f, fact in zip(files, facts, strict=True)]
    record.write_manifest(folder / "manifest.json", manifest | {"outputs": outputs})


class Builder:
    """Writes steps of one profile below `root` in the way that notebooks do."""

    def __init__(self, root: Path, profile: str = "laptop"):
        self.root, self.profile = root / profile, profile

    def open(self, step: str, scope: str, parameters: dict[str, Any] | None = None, inputs: tuple = ()) -> Run:
        values = {"profile": self.profile, "scope": scope, **(parameters or {})}
        job = Job(step, scope, values, inputs)
        return Run(job, self.root, record.prepare_work_dir(job, self.root, "0" * 64), "0" * 64, {}, batch=True)

    def close(self, run: Run, headline: str) -> None:
        run.finish(headline)
        record.publish_step(self.root, run.job.scope, run.job.step)
        notebook = self.root / run.job.scope / f"{run.job.step}.ipynb"
        nbformat.write(executed_notebook(run.job.step, run.job.scope, headline), notebook)
        path = self.root / run.job.scope / run.job.step / "manifest.json"
        record.write_manifest(path, json.loads(path.read_text()) | {"notebook_sha256": record.sha256(notebook)})

    def fail(self, step: str, scope: str, message: str = "ValueError: loss is not a number") -> None:
        """A failed attempt: the record says so, there is no manifest."""
        notebook = executed_notebook(step, scope, message)
        cell = new_code_cell("train()", execution_count=9)
        cell.outputs = [new_output("error", ename="ValueError", evalue=SCRIPT, traceback=[f"\x1b[31m{message}\x1b[0m"])]
        notebook.cells.append(cell)
        (self.root / scope).mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, self.root / scope / f"{step}.failed.ipynb")
        shutil.rmtree(self.root / scope / step, ignore_errors=True)
        (self.root / scope / f"{step}.ipynb").unlink(missing_ok=True)


def executed_notebook(step: str, scope: str, headline: str) -> nbformat.NotebookNode:
    """A small executed record with every kind of output that our notebooks have."""
    table = pd.DataFrame({"answer": [SCRIPT, "Restart the router."], "tokens": [41, 12]})
    cells = [
        new_markdown_cell(
            f"# What does {step} do in {scope}?\n\n- **Reads** [02_synth](02_synth.ipynb)\n- **Takes** 1 min\n\n$x^2$"
        ),
        new_code_cell("seed = 20260605  # seed", metadata={"tags": ["parameters"]}, execution_count=1),
        new_code_cell("run = record.open_run(...)", metadata={"tags": ["setup"]}, execution_count=2),
        new_code_cell("table", execution_count=3),
        new_code_cell("record.say(text)", execution_count=4),
        new_code_cell("run.finish(...)", metadata={"tags": ["results"]}, execution_count=5),
    ]
    html = table.to_html()
    cells[3].outputs = [
        new_output("execute_result", {"text/html": html, "text/plain": str(table)}, execution_count=3),
        new_output(
            "display_data", {"image/png": PNG, "text/plain": "<Image>"}, metadata={"image/png": {"alt": "one dot"}}
        ),
        new_output("stream", text=f"plain {SCRIPT}\n"),
    ]
    cells[4].outputs = [
        new_output("display_data", {"text/markdown": f"The loss is **0.5**. {SCRIPT}", "text/plain": "x"})
    ]
    box = f'<div class="headline" style="border-left:4px solid #0072b2">{headline}</div>'
    cells[5].outputs = [new_output("execute_result", {"text/html": box, "text/plain": "x"}, execution_count=5)]
    return new_notebook(cells=cells)


def build_study(
    root: Path, n: int = 16, judges: tuple[str, ...] = ("checklist", "embedding"), repeats: int = 2, seed: int = 7,
    n_words: int | None = None,
) -> Path:  # fmt: skip
    """The whole tree up to 05 for n configurations, with answers of so many words; returns the profile's folder."""
    builder, rng = Builder(root), np.random.default_rng(seed)
    configs = design(n)
    planted = truth(configs, seed)
    prompts = _shared(builder, rng)
    for config, row in configs.iterrows():
        _train(builder, rng, str(config), row, planted.loc[config], 1)
        _answer(builder, rng, str(config), prompts, planted.loc[config, "energy"], n_words)
    _answer(builder, rng, "untuned", prompts, 0.3)
    for config in list(configs.index)[:repeats]:
        for s in (1, 2):
            shift = planted.loc[config] + [rng.normal(0, 0.004), 0, 0]
            _train(builder, rng, f"{config}-seed{s}", configs.loc[config], shift, s)
            _answer(builder, rng, f"{config}-seed{s}", prompts, planted.loc[config, "energy"])
    again = [f"{config}-seed{s}" for config in list(configs.index)[:repeats] for s in (1, 2)]
    luck = np.random.default_rng(seed + 1).normal(0, 0.3, len(again))
    runs = pd.Series(planted["quality"].reindex([config_of(run) for run in again]).to_numpy() + luck, again)
    for name in judges:
        add_judge(builder, rng, name, pd.concat([planted["quality"], runs]))
    return builder.root


def _shared(builder: Builder, rng: np.random.Generator) -> pd.DataFrame:
    run = builder.open("01_glossary", "shared")
    run.artefact("glossary.json").write_text("[]")
    run.metric(terms=52)
    builder.close(run, "52 terms.")
    run = builder.open("02_synth", "shared")
    prompts = pd.DataFrame(
        {
            "prompt_id": [f"p{i:03d}" for i in range(40)],
            "test_set": [("test", "noisy", "unseen")[i % 3] for i in range(40)],
            "scenario_id": [f"s{i:03d}" for i in range(40)],
            "term_id": [f"t{i % 20}" for i in range(40)],
            "problem_id": [f"q{i}" for i in range(40)],
            "kind": "fault",
            "context": "usual",
            "messages": [
                [{"role": "user", "content": f"My eSIM fails, case {i}. {SCRIPT if i == 0 else ''}"}] for i in range(40)
            ],
            "reference": "Delete the profile and load it again.",
        }
    )
    prompts.to_parquet(run.artefact("test_prompts.parquet"))
    card = {"generator": {"name": "offline"}, "kept": 29871, "samples": [{"sample": "train", "rows": 2048}]}
    run.artefact("dataset_card.json").write_text(json.dumps(card))
    run.metric(conversations=29871)
    builder.close(run, "29,871 conversations were kept.")
    return prompts


def _train(
    builder: Builder, rng: np.random.Generator, scope: str, row: pd.Series, planted: pd.Series, seed: int
) -> None:
    run = builder.open("03_train", scope, {"seed": seed, "base_model": "smollm2-135m-instruct"})
    steps = np.arange(1, 31) * int(row["epochs"])
    curve = planted["loss"] + 1.4 * np.exp(-np.arange(30) / 6) + rng.normal(0, 0.03, 30)
    run.table(
        "loss_curve",
        pd.DataFrame({"step": steps, "tokens_seen": steps * 900, "epoch": steps / 30, "train_loss": curve}),
    )
    scenario_noise = np.random.default_rng(99).normal(0, 0.08, 60)
    tokens = rng.integers(40, 120, 120)
    per_token = planted["loss"] + scenario_noise[np.arange(120) % 60] + rng.normal(0, 0.01, 120)
    per_token += planted["loss"] - (per_token * tokens).sum() / tokens.sum()
    losses = pd.DataFrame(
        {
            "conversation_id": [f"v{i}" for i in range(120)],
            "scenario_id": [f"s{i % 60}" for i in range(120)],
            "term_id": [f"t{i % 30}" for i in range(120)],
            "n_tokens": tokens,
            "loss_sum_before": tokens * 1.9,
            "loss_sum_after": tokens * per_token,
        }
    )
    run.table("val_losses", losses)
    run.table("energy", energy_table("train", planted["energy"]))
    wh = planted["energy"]
    run.metric(
        **row.to_dict(), seed=seed, val_loss=losses["loss_sum_after"].sum() / tokens.sum(),
        train_tokens=int(27000 * row["epochs"]), train_seconds=wh * 200, tokens_per_second=400.0, train_energy_wh=wh,
        train_energy_low_wh=wh * 0.5, train_energy_high_wh=wh * 1.7, energy_kind="estimated",
        energy_source="cpu_time_model",
    )  # fmt: skip
    builder.close(run, f"The validation loss is {planted['loss']:.3f}.")


def energy_table(window: str, wh: float, kind: str = "estimated") -> pd.DataFrame:
    joules = wh * 3600
    cpu = {
        "window": window, "component": "cpu", "kind": kind, "source": "cpu_time_model", "scope": "process",
        "gross_j": joules, "idle_w": 1.1, "net_j": joules * 0.8, "low_j": joules * 0.5, "high_j": joules * 1.7,
        "window_s": 31.0, "n_windows": 1, "n_repeats": 1, "valid": True, "invalid_reason": None, "device": "CPU",
    }  # fmt: skip
    none = dict.fromkeys(cpu) | {"window": window, "component": "gpu", "kind": "none", "valid": False}
    return pd.DataFrame([cpu, none, cpu | {"component": "total"}])


def _answer(
    builder: Builder, rng: np.random.Generator, scope: str, prompts: pd.DataFrame, wh: float, n_words: int | None = None
) -> None:
    """Answers of one scope, of so many random words; c02 loops in 5 of them until the limit."""
    run = builder.open("04_energy", scope)
    answers = pd.DataFrame(
        {
            "config": scope,
            "prompt_id": prompts["prompt_id"],
            "answer": [f"{scope}: delete the eSIM profile, then load it again. {SCRIPT}" for _ in prompts["prompt_id"]],
            "n_tokens": rng.integers(20, 60, len(prompts)),
            "finish_reason": "stop",
            "seconds": 0.4,
        }
    )
    if n_words:
        words = (ROOT / "README.md").read_text(encoding="utf-8").split()
        drawn = np.random.default_rng([*scope.encode()]).choice(words, (len(answers), n_words))
        answers["answer"] = [" ".join(row) for row in drawn]
    if scope == "c02":
        answers.loc[:4, ["answer", "finish_reason"]] = ["restart the phone " * 9, "length"]
    answers.to_parquet(run.artefact("answers.parquet"))
    losses = prompts[["prompt_id", "test_set", "term_id"]].assign(n_tokens=20)
    run.table("reference_losses", losses.assign(loss_sum=20 * rng.normal(0.6, 0.1, len(prompts))))
    known = np.random.default_rng(len(scope)).uniform(0.6, 0.9)
    items = pd.DataFrame({"item_id": [f"i{i}" for i in range(30)], "kind": ["problem", "figure", "general"] * 10})
    items = items.assign(term_id=[f"t{i % 10}" for i in range(30)], margin=known - rng.uniform(0, 1, 30))
    run.table("choices", items.assign(right=items["margin"] > 0))
    texts = [f"g{i}" for i in range(12)]
    run.table("general_losses", pd.DataFrame({"text_id": texts, "loss": 3.0 + rng.normal(0, 0.1, 12)}))
    strengths = [(s, f"p{i:03d}", f"t{i}", 20, 20 * (0.6 + (s - 0.9) ** 2)) for s in (0.5, 1.0) for i in range(12)]
    columns = ["strength", "prompt_id", "term_id", "n_tokens", "loss_sum"]
    run.table("strengths", pd.DataFrame(strengths if scope != "untuned" else [], columns=columns))
    by_set = losses["test_set"].unique()
    run.metric(**{f"{name}_{part}": 0.6 + rng.normal(0, 0.05) for name in by_set for part in ("loss", "perplexity")})
    run.table("energy", energy_table("answer", wh / 3))
    run.metric(answer_energy_wh=wh / 3, answer_energy_low_wh=wh / 6, answer_energy_high_wh=wh / 2,
               energy_kind="estimated", energy_source="cpu_time_model", answers=len(prompts),
               answer_energy_per_answer_wh=wh / 3 / len(prompts),
               stopped_share=(answers["finish_reason"] == "stop").mean())  # fmt: skip
    builder.close(run, f"{len(prompts)} answers.")


def add_judge(builder: Builder, rng: np.random.Generator, name: str, quality: pd.Series, passed: bool = True) -> None:
    run = builder.open("05_judge", f"judge-{name}", {"judge": name, "judge_kind": name})
    write_judge(run, rng, name, quality + rng.normal(0, 0.12, len(quality)), passed)
    builder.close(run, f"{name} has judged.")


def write_judge(run: Run, rng: np.random.Generator, name: str, score: pd.Series, passed: bool = True) -> None:
    """Tables and artefacts of 05 for one judge whose scores are given."""
    score = score - score.mean()
    anchors = dict.fromkeys(FLOORS, score.min() - 1) | {GOLD: score.max() + 1}
    everyone = pd.concat([score, pd.Series(anchors)])
    noise = rng.normal(0, 0.18, (400, len(everyone)))
    draws = pd.DataFrame(everyone.to_numpy() + noise, columns=everyone.index)
    ranked = draws[score.index].rank(axis=1, ascending=False)
    ranking = pd.DataFrame({"config": everyone.index, "score": everyone.to_numpy()})
    ranking["low"], ranking["high"] = draws.quantile(0.025).to_numpy(), draws.quantile(0.975).to_numpy()
    ranking["rank"] = score.rank(ascending=False).reindex(everyone.index).to_numpy()
    ranking["rank_low"] = ranked.quantile(0.025).reindex(everyone.index).to_numpy().round()
    ranking["rank_high"] = ranked.quantile(0.975).reindex(everyone.index).to_numpy().round()
    ranking["p_best"] = (ranked == 1).mean().reindex(everyone.index).to_numpy()
    ranking["n_judgements"], ranking["mean_words"] = 390, rng.normal(45, 5, len(everyone))
    ranking["is_anchor"], ranking["n_terms"] = ~ranking["config"].isin(score.index), 20
    run.table("ranking", ranking)
    long = draws.rename_axis("draw").reset_index().melt("draw", var_name="config", value_name="score")
    run.table("score_draws", long)
    pairs = [(a, b) for i, a in enumerate(score.index) for b in score.index[i + 1 :]]
    wins = pd.DataFrame(pairs, columns=["config_a", "config_b"])
    wins["wins_a"], wins["ties"], wins["wins_b"] = rng.integers(3, 12, len(pairs)), 3, rng.integers(3, 12, len(pairs))
    run.table("pairs", wins)
    metrics = [("p_first_seat", 0.52), ("swap_consistency", 0.9), ("tie_share", 0.14), ("test_retest", 0.97)]
    agreement = pd.DataFrame([(m, v, v - 0.03, v + 0.03, 390) for m, v in metrics])
    run.table("agreement", agreement.set_axis(["metric", "value", "low", "high", "n"], axis=1))
    run.table("checks", checks_of(everyone))
    points_of(everyone).to_parquet(run.artefact("points.parquet"))
    write_judgements(run, score)
    ids = {"judgement_id": "x", "prompt_id": "p000", "scenario_id": "s000", "config": list(score.index)}
    rated = {criterion: rng.integers(1, 6, len(score)) for criterion in cases.CRITERIA}
    pd.DataFrame(ids | rated).to_parquet(run.artefact("ratings.parquet"))
    controls = [{"control": "corrupted reference", "value": 0.97 if passed else 0.6, "threshold": 0.95, "n": 40,
                 "passed": passed, "detail": ""}]  # fmt: skip
    blocks = [] if passed else ["failed its validity gate (corrupted reference)"]
    validity = {"judge": name, "passed": passed, "controls": controls, "headline_blocks": blocks}
    run.artefact("validity.json").write_text(json.dumps(validity))
    run.metric(judge_kind=name, gate_passed=passed, coverage=1.0, n_judgements=3120, p_first_seat=0.52,
               swap_consistency=0.9, tie_share=0.14, missingness_p=None)  # fmt: skip


def checks_of(score: pd.Series) -> pd.DataFrame:
    """What the checklist finds in answers that make more points, the higher their configuration scores."""
    rng = np.random.default_rng(6)
    rows = pd.DataFrame([(c, f"p{i:03d}", f"t{i}") for c in score.index for i in range(20)])
    rows = rows.set_axis(["config", "prompt_id", "term_id"], axis=1)
    level = 0.5 + 0.1 * rows["config"].map(score.fillna(0)) + rng.normal(0, 0.05, len(rows))
    rows["test_set"], rows["coverage"], rows["content"] = "test", level.clip(0, 1), level.clip(0, 1)
    rows["taught"] = pd.Series(rows["prompt_id"].str[-1].astype(int) < 7, dtype="boolean")
    style = rng.uniform(0.5, 1, len(rows))
    found = {"style": style, "faultless": style, "unsafe": False, "asks_for_secret": False, "flags": ""}
    return rows.assign(n_words=40, **found)


def points_of(score: pd.Series) -> pd.DataFrame:
    """Three points of each question; higher scores make more of them."""
    rows = [(c, f"p{i:03d}", f"point {k}") for c in score.index for i in range(20) for k in range(3)]
    points = pd.DataFrame(rows, columns=["config", "prompt_id", "point"])
    return points.assign(credit=(0.5 + 0.1 * points["config"].map(score.fillna(0))).clip(0, 1))


def write_judgements(run: Run, score: pd.Series) -> None:
    """Verdicts on a fixed plan, so that two judges share their comparisons; the higher score wins if clearly higher."""
    plan = np.random.default_rng(5)
    rows = []
    for k in range(300):
        first, second = plan.choice(score.index, 2, replace=False)
        lead = score[first] - score[second] + plan.normal(0, 0.5)
        winner = "tie" if abs(lead) < 0.1 else first if lead > 0 else second
        ids = {"prompt_id": f"p{k % 40:03d}", "scenario_id": f"s{k % 40:03d}", "purpose": "ranking"}
        rows.append(ids | {"config_first": first, "config_second": second, "winner": winner})
    frame = pd.DataFrame(rows).drop_duplicates(["prompt_id", "config_first", "config_second"])
    frame.to_parquet(run.artefact("judgements.parquet"))


def analysis_job(root: Path, n: int, judges: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """The job that a runner hands to 06 (see notebook.open_run), for a tree of `build_study`."""
    from telco_nb.study.plan import inputs_of

    configs = list(design(n).index)
    values = {
        "profile": root.name,
        "scope": "study",
        "configs": configs,
        "repeats": [f"{c}-seed{s}" for c in configs[:repeats] for s in (1, 2)],
        "drift_runs": [],
        "judges": list(judges),
        "bootstrap_draws": 400,
        "seed": 20260605,
        "claims_path": "params/claims.yaml",
        "usd_per_kwh": 0.25,
        "carbon_g_per_kwh": 436.0,
        "carbon_source": "a grid, 2022",
        "pue": 1.0,
    }
    job = Job("06_analysis", "study", values, inputs_of("06_analysis", values))
    work = record.prepare_work_dir(job, root, "0" * 64)
    return {"step": job.step, "scope": job.scope, "parameters": values, "inputs": job.inputs, "root": str(root),
            "work": str(work), "key": "0" * 64, "key_parts": {}}  # fmt: skip


def run_analysis(root: Path, n: int, judges: tuple[str, ...], repeats: int, monkeypatch: Any) -> Path:
    """Run the cells of 06 here, without a kernel, on a tree of `build_study`; returns the folder of the step."""
    from IPython.display import display

    job = analysis_job(root, n, judges, repeats)
    job_file = root / "job.json"
    job_file.write_text(json.dumps(job))
    monkeypatch.setenv(record.JOB_VARIABLE, str(job_file))
    monkeypatch.setattr(notebook, "die_with_parent", lambda: None)
    names: dict[str, Any] = {"display": display, "__name__": "notebook"}
    for cell in nbformat.read(ROOT / "notebooks" / "06_analysis.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= job["parameters"]
    record.publish_step(root, "study", "06_analysis")
    record_of_06 = executed_notebook("06_analysis", "study", "analysed")
    for path in sorted((root / "study" / "06_analysis" / "figures").glob("*.png")):
        data = {"image/png": base64.b64encode(path.read_bytes()).decode(), "text/plain": "<Image>"}
        shown = new_output("display_data", data, metadata={"image/png": {"alt": f"alt of {path.stem}"}})
        record_of_06.cells.append(new_code_cell("run.figure(...)", outputs=[shown], execution_count=9))
    nbformat.write(record_of_06, root / "study" / "06_analysis.ipynb")
    job_file.unlink()
    return root / "study" / "06_analysis"
