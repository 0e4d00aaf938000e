"""Builds parts of the one-file report: the figures of 06, and one card per configuration."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from telco_nb.analysis.recommendation import describe_config, energy_text
from telco_nb.report.files import Cell, StudyFiles, read_json, read_or_none
from telco_nb.study.plan import STEPS

FIGURE_BYTES = 3_500_000  # of base64; figures beyond this are shown on the pages only
ANSWER_CHARACTERS = 700
CURVE_POINTS = 60
PNG_START = b"\x89PNG\r\n\x1a\n"
GUESSED = ("estimated", "allocated")
CHOSEN = {"not fit": ("front-runner, not fit", "bad"), "cannot tell": ("best guess", "note")}  # else: deploy


def figures(root: Path) -> list[dict[str, Any]]:
    """The figures of 06 in the notebook's order, with its alt texts; `src` is None if one is too large or broken."""
    alts = _alt_texts(read_or_none(read_json, root / "study" / "06_analysis.ipynb") or {})
    places = {digest: place for place, digest in enumerate(alts)}
    images = []
    for path in sorted((root / "study" / "06_analysis" / "figures").glob("*.png")):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        images.append((places.get(digest, len(places)), alts.get(digest) or path.stem.replace("_", " "), data))
    shown, used = [], 0
    for _, alt, data in sorted(images, key=lambda image: image[0]):
        figure: dict[str, Any] = {"src": None, "alt": alt, "width": None, "height": None}
        encoded = base64.b64encode(data).decode()
        if data.startswith(PNG_START) and used + len(encoded) <= FIGURE_BYTES:
            used += len(encoded)
            width, height = struct.unpack(">II", data[16:24])
            figure |= {"src": f"data:image/png;base64,{encoded}", "width": width, "height": height}
        shown.append(figure)
    return shown


def _alt_texts(notebook: Mapping[str, Any]) -> dict[str, str]:
    """The alt text of every PNG in a notebook by the sha256 of the PNG, in order."""
    alts = {}
    for cell in notebook.get("cells", []):
        for output in cell.get("outputs", []):
            if encoded := output.get("data", {}).get("image/png"):
                raw = base64.b64decode("".join(encoded))
                alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
                alts[hashlib.sha256(raw).hexdigest()] = alt
    return alts


def roles(study: StudyFiles) -> dict[str, tuple[str, str]]:
    """What the findings say about a configuration, in two words, with the tone of the label."""
    deploy, loss = (study.finding(id) or {} for id in ("deploy", "loss_choice"))
    chosen = CHOSEN.get(deploy.get("verdict", ""), ("deploy", "good"))
    found = {loss.get("value"): ("lowest loss", ""), study.front_runner: chosen}
    return {config: role for config, role in found.items() if config}


def config_cards(study: StudyFiles) -> list[dict[str, Any]]:
    """One card per configuration, also for those that failed or have no result yet."""
    prompts = read_or_none(_prompts, study.root)
    curves = {config: read_or_none(_curve, study.root, config) for config in study.configs}
    scale = _curve_scale([curve for curve in curves.values() if curve is not None])
    most = study.results["train_energy_wh"].max() if "train_energy_wh" in study.results else math.nan
    told = roles(study)
    return [
        {
            "config": config,
            "chosen": config == study.front_runner,
            "role": told.get(config, ("", ""))[0],
            "tone": told.get(config, ("", ""))[1],
            "failed": _failed_steps(study, config),
            "answers": [] if prompts is None else read_or_none(_answers, study.root, config, prompts) or [],
            **_card_numbers(study, config, most),
            "curve": None if curves[config] is None else _polyline(curves[config], scale, study.results, config),
        }
        for config in study.configs
    ]


def _failed_steps(study: StudyFiles, config: str) -> str:
    cells = {step: study.cells.get((config, step), Cell("")) for step in STEPS}
    return ", ".join(f"{step[:2]} {cell.text}" for step, cell in cells.items() if cell.state not in ("ok", ""))


def _card_numbers(study: StudyFiles, config: str, most: float) -> dict[str, Any]:
    if config not in study.results.index:
        return {"parameters": "no result", "facts": [], "bar": None, "guess": False}
    row = study.results.loc[config]
    facts = [("training energy", energy_text(row) or "not known")]
    facts.append(("validation loss", "not known" if pd.isna(row["val_loss"]) else f"{row['val_loss']:.4f}"))
    for judge in study.judges:
        score, rank = row[f"{judge}_score"], row[f"{judge}_rank"]
        text = (
            "not judged"
            if pd.isna(score)
            else f"{score:+.2f}, {ordinal(rank)} of {int(study.results[f'{judge}_rank'].count())}"
        )
        facts.append((study.judge_name(judge), text))
    energy = row["train_energy_wh"]
    bar = None if pd.isna(energy) or not most > 0 else round(100 * energy / most, 1)
    return {"parameters": describe_config(row), "facts": facts, "bar": bar, "guess": row["energy_kind"] in GUESSED}


def _prompts(root: Path) -> dict[str, str]:
    """Two prompts of different test sets, the same for every card: the customer's last message by prompt_id."""
    frame = pd.read_parquet(root / "shared" / "02_synth" / "artefacts" / "test_prompts.parquet")
    frame = frame.sort_values("prompt_id")
    first = pd.concat([frame.drop_duplicates("test_set"), frame]).drop_duplicates("prompt_id").head(2)
    questions = [[m["content"] for m in messages if m["role"] == "user"][-1] for messages in first["messages"]]
    return dict(zip(first["prompt_id"], questions, strict=True))


def _answers(root: Path, config: str, prompts: Mapping[str, str]) -> list[dict[str, str]]:
    path = root / config / "04_energy" / "artefacts" / "answers.parquet"
    answers = pd.read_parquet(path, columns=["prompt_id", "answer"]).set_index("prompt_id")["answer"]
    return [
        {"question": _cut(question), "text": _cut(answers[prompt_id] or "(empty answer)")}
        for prompt_id, question in prompts.items()
        if prompt_id in answers.index
    ]


def _cut(text: str) -> str:
    return text if len(text) <= ANSWER_CHARACTERS else f"{text[:ANSWER_CHARACTERS].rstrip()} ..."


def _curve(root: Path, config: str) -> pd.DataFrame:
    frame = pd.read_parquet(root / config / "03_train" / "tables" / "loss_curve.parquet")
    frame = frame[["tokens_seen", "train_loss"]].dropna()
    step = max(1, math.ceil(len(frame) / CURVE_POINTS))
    thinned = frame.rolling(step, min_periods=1).mean().iloc[::-step].iloc[::-1]
    if thinned.empty:
        raise ValueError("an empty curve")
    return thinned


def _curve_scale(curves: Sequence[pd.DataFrame]) -> tuple[float, float, float]:
    """(most tokens, lowest loss, highest loss) over all curves: all cards have the same axes."""
    if not curves:
        return (1.0, 0.0, 1.0)
    both = pd.concat(curves)
    low, high = both["train_loss"].min(), both["train_loss"].max()
    return (max(both["tokens_seen"].max(), 1.0), low, high if high > low else low + 1)


def _polyline(
    curve: pd.DataFrame, scale: tuple[float, float, float], results: pd.DataFrame, config: str
) -> dict[str, Any]:
    most, low, high = scale

    def height(loss: float) -> float:
        return round(72 - 66 * (loss - low) / (high - low), 1)

    x = 30 + 266 * curve["tokens_seen"] / most
    points = " ".join(f"{a:.1f},{height(b)}" for a, b in zip(x, curve["train_loss"], strict=True))
    val_loss = results["val_loss"].get(config) if "val_loss" in results else None
    first, last = curve["train_loss"].iloc[0], curve["train_loss"].iloc[-1]
    tokens = f"{curve['tokens_seen'].iloc[-1]:,.0f}"
    alt = f"Training loss of {config} from {first:.2f} to {last:.2f} over {tokens} tokens."
    level = None if val_loss is None or pd.isna(val_loss) else min(max(height(val_loss), 2.0), 76.0)
    return {"points": points, "level": level, "low": f"{low:.2f}", "high": f"{high:.2f}", "tokens": tokens, "alt": alt}


def ordinal(value: float) -> str:
    """1st, 2nd, 3rd, 4th, 11th; a half rank stays a number."""
    if value != int(value):
        return f"{value:g}"
    n = int(value)
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
