"""Good files of every kind that people or other programs write, how each is mutated, and what reads it.

tests/faults/test_odd_files.py tries them; this is not a test.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import judge_study
import shipped
import yaml
from hypothesis import strategies as st

from telco_nb import ROOT
from telco_nb.commands import estimate, rerank
from telco_nb.corpus import choices, gold, scenarios, variants
from telco_nb.corpus.cards import load_cards
from telco_nb.engine import schedule
from telco_nb.hosted import attempts
from telco_nb.hosted.ledger import BatchLedger
from telco_nb.hosted.lines import StoreError
from telco_nb.judge import asking, blind_pairs
from telco_nb.judge.bradley_terry import RankingError
from telco_nb.judge.checklist import ChecklistJudge
from telco_nb.judge.panel import open_judge
from telco_nb.judge.store import VerdictStore
from telco_nb.judge.votes_file import one_vote_each, read_votes
from telco_nb.study import manifest, params, record, seal
from telco_nb.study.input_files import InputFileError
from telco_nb.study.plan import plan_jobs, refuse_too_few

DEEP = 60
DOCUMENTED = (InputFileError, schedule.UsageError, StoreError, RankingError, record.RecordError)
BANKING = ROOT / "tests" / "unit" / "corpus" / "data"


def deep(kind: type) -> Any:
    value: Any = "x"
    for _ in range(DEEP):
        value = [value] if kind is list else {"a": value}
    return value


ODD_VALUES = [
    None, True, False, 0, -1, 1, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, float("inf"), float("nan"), "", " ", "x",
    "x" * 100_000, "\x00", "\x1b[2J", "é\u202e", "\ud800", "~nosuchuser", "../..", "nan", "2026-02-31", "{a}", "%s",
    [], {}, [[]], [None], [{}], {"a": 1}, {"": None}, deep(list), deep(dict), ["x"] * 1000,
]  # fmt: skip
ODD_YAML = [
    "!!python/object/apply:os.getcwd []", "!!int five", "!!float x", "!!timestamp 2026-02-31", "!!omap [a]", "!x y",
    "*a", "&a [*a]", "&a [1, 1]", "{? [1, 2] : 3}", "{1: 2}", "{null: 2}", ".inf", "-.inf", ".nan", "0x" + "f" * 400,
    "9" * 5000, "1" + "0" * 400 + ".0", "1e-4", "016", "1:30", "yes", "2026-02-31", "2026-01-01", '"\\0"', '"\\e[2J"',
    '"\\ud800"', "[" * 3000, "{" * 3000, "- " * 3000, "? " * 3000, "|", ">", "'", '"', "%", "@", "<<", "{<<: 1}",
]  # fmt: skip
ODD_JSON = [
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "9" * 400, "[" * 3000, '{"a":' * 3000, '"\\ud800"',
    '"\\u0000"', '"\\u001b[2J"', '{"a": 1, "a": 2}', "'x'", "01", "True", "", "{", "]", "//", '"\t"',
]  # fmt: skip
ODD_BYTES = [
    b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\r\n\r\n", b"\x1a", b"\xc2\x85",
    b"\xe2\x80\xa8", b"\t", b"sep=;\n", b"\x7f", b"---\n", b"...\n", b"\n\n\n",
]  # fmt: skip


# ---------------------------------------------------------------- mutations


def places(value: Any, above: tuple = ()) -> Iterator[tuple]:
    """Every place in a value of lists and mappings, as keys from the top."""
    yield above
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*above, key))


def changed(data: st.DataObject, value: Any) -> Any:
    """The value with one of its parts replaced, removed, renamed or added."""
    *above, key = data.draw(st.sampled_from([*places(value)][1:] or [("",)]))
    value = copy.deepcopy(value)
    part = value
    for name in above:
        part = part[name]
    match data.draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"])):
        case "remove" if isinstance(part, dict | list) and part:
            del part[key]
        case "rename" if isinstance(part, dict) and key in part:
            part[f"{key}{data.draw(st.sampled_from(['x', ' ', '.', chr(0)]))}"] = part.pop(key)
        case "add" if isinstance(part, dict):
            part[data.draw(st.sampled_from(["extra", "", "a.b", "<<", "é"]))] = data.draw(st.sampled_from(ODD_VALUES))
        case _ if isinstance(part, dict | list) and part:
            part[key] = data.draw(st.sampled_from(ODD_VALUES))
        case _:
            return data.draw(st.sampled_from(ODD_VALUES))
    return value


def yaml_text(data: st.DataObject, text: str) -> bytes:
    """A YAML file with a value changed, or with an odd spelling in the place of one."""
    if data.draw(st.booleans()):
        return yaml.safe_dump(changed(data, yaml.safe_load(text)), sort_keys=False).encode("utf-8", "surrogatepass")
    lines = text.split("\n")
    i = data.draw(st.sampled_from([i for i, line in enumerate(lines) if line.strip() and line.strip()[0] != "#"]))
    before, mark, _ = lines[i].partition(": ")
    lines[i] = f"{before}{mark or ': '}{data.draw(st.sampled_from(ODD_YAML))}"
    return "\n".join(lines).encode()


def json_line(data: st.DataObject, text: str) -> str:
    if data.draw(st.booleans()):
        return json.dumps(changed(data, json.loads(text)))
    marked = json.dumps(_with_mark(data, json.loads(text)))
    return marked.replace('"MARK"', data.draw(st.sampled_from(ODD_JSON)), 1)


def _with_mark(data: st.DataObject, value: Any) -> Any:
    *above, key = data.draw(st.sampled_from([*places(value)][1:] or [("",)]))
    part = value
    for name in above:
        part = part[name]
    if not isinstance(part, dict | list) or not part:
        return "MARK"
    part[key] = "MARK"
    return value


def json_lines(data: st.DataObject, text: str) -> bytes:
    """A JSONL file with one line changed; a JSON file is one line."""
    lines = text.rstrip("\n").split("\n")
    i = data.draw(st.integers(0, len(lines) - 1))
    lines[i] = json_line(data, lines[i])
    return ("\n".join(lines) + "\n").encode()


def csv_text(data: st.DataObject, text: str) -> bytes:
    """A table with an odd cell, perhaps with other separators or quotation marks."""
    rows = list(csv.reader(io.StringIO(text)))
    row = data.draw(st.sampled_from(rows))
    place = data.draw(st.integers(0, len(row) - 1))
    odd = [str(value)[:2000] for value in ODD_VALUES] + [*ODD_JSON, '"', '""', "a,b", ";", "\t", "a\nb", "x" * 200_000]
    row[place] = data.draw(st.sampled_from(odd))
    if data.draw(st.integers(0, 5)) == 0:
        row.pop(place)
    written = io.StringIO()
    separator = data.draw(st.sampled_from([",", ",", ",", ";", "\t", "|"]))
    csv.writer(written, delimiter=separator, lineterminator="\n").writerows(rows)
    return written.getvalue().encode("utf-8", "surrogatepass")


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Bytes cut off, put in, replaced, or of another encoding."""
    place = data.draw(st.integers(0, len(content)))
    match data.draw(st.sampled_from(["cut", "insert", "flip", "random", "utf-16", "line ends", "twice"])):
        case "cut":
            return content[:place]
        case "insert":
            return content[:place] + data.draw(st.sampled_from(ODD_BYTES)) + content[place:]
        case "flip":
            return content[:place] + data.draw(st.binary(min_size=1, max_size=4)) + content[place + 1 :]
        case "random":
            return data.draw(st.binary(max_size=200))
        case "utf-16":
            return content.decode("utf-8", "replace").encode("utf-16")
        case "line ends":
            return content.replace(b"\n", data.draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b""])))
        case _:
            return content + content


def mutated(data: st.DataObject, mutate: Callable[[st.DataObject, str], bytes], content: bytes) -> bytes:
    if data.draw(st.integers(0, 3)) == 0:
        return damaged(data, content)
    new = mutate(data, content.decode())
    return damaged(data, new) if data.draw(st.integers(0, 7)) == 0 else new


# ---------------------------------------------------------------- the kinds of files


class Kind(NamedTuple):
    """Good files in a folder, the one that is mutated, how it is mutated, and what reads the folder."""

    prepare: Callable[[Path], None]
    name: str
    mutate: Callable[[st.DataObject, str], bytes]
    read: Callable[[Path], Any]


def parameters(folder: Path) -> None:
    shutil.copytree(params.PARAMS_DIR, folder / "params")
    profile = folder / "params" / "profiles" / "smoke.yaml"
    profile.write_text(profile.read_text() + "judges: [checklist, own-server]\n")


def plan(folder: Path) -> None:
    study = schedule.load_study(schedule.Options(profile="smoke", params_dir=folder / "params"))
    jobs = plan_jobs(study)
    refuse_too_few(jobs)
    for job in jobs:
        schedule.hosted_model(job)


def judge(folder: Path) -> None:
    plan(folder)
    study = params.load_study("smoke", folder / "params")
    open_judge(study.values("judge-own-server"), folder)


def copied(*sources: Path) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for source in sources:
            copy_of = shutil.copytree if source.is_dir() else shutil.copyfile
            copy_of(source, folder / source.name)

    return prepare


def cards(folder: Path) -> None:
    found, contexts = load_cards(folder / "banking"), scenarios.load_contexts(folder / "banking_contexts.yaml")
    grid = scenarios.build_scenarios(found, contexts, [])
    for row in variants.write_variants(found, grid[:3], contexts, range(2)):
        json.dumps(row).encode()


def tables(folder: Path) -> None:
    load_cards(folder / "banking_tables")


def first_lines(source: Path, n: int = 3) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        lines = source.read_text(encoding="utf-8").split("\n")[:n]
        (folder / source.name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return prepare


def written(name: str, text: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return prepare


PROMPTS = 'prompt,reference,term,problem\n"My phone asks for a PUK, why?",Stop typing.,puk,need_puk\nno service,,,\n'
VOTES = "".join(
    json.dumps(vote) + "\n"
    for vote in (
        {"pair_id": "a1", "vote": "a", "margin": 2, "seconds": 3.5, "reason": "short", "rater": "ann"},
        {"pair_id": "b2", "vote": "tie", "rater": "ann", "time": "2026-03-31T10:15:00+00:00"},
    )
)
VOTES_TABLE = "pair_id,vote,margin,seconds,reason,rater,time\na1,a,2,3.5,short,ann,2026-03-31\nb2,tie,,,,ann,\n"
KEY = json.dumps(dict.fromkeys(blind_pairs.KEY_COLUMNS, "x") | {"position": 1, "repeat": 0}) + "\n"
ATTEMPTS = (
    '{"call_id": "a", "status": "ok", "usd": 0.1, "model_asked": "m", "tokens_in": 5, "tokens_out": 9}'
    "\n"
    '{"call_id": "b", "status": "timeout", "usd": null, "usd_at_most": 0.2, "model_asked": "m"}\n'
)
LEDGER = (
    '{"event": "submitting", "ids": ["a", "b"], "usd_at_most": 0.5}\n'
    '{"event": "submitted", "entry": 0, "handle": {"id": "x"}}\n'
    '{"event": "collected", "entry": 0, "usd_at_most": -0.5}\n'
)


@cache
def store_text() -> str:
    """A small store of verdicts: a plan, and the answers of the checklist."""
    prompts = judge_study.make_prompts(3)
    answers = judge_study.make_answers(prompts, ["c01", "c02"])
    plan = judge_study.pair_plan(prompts, ["c01", "c02"])
    with tempfile.TemporaryDirectory() as folder:
        store = VerdictStore(Path(folder) / "verdicts.jsonl")
        cases = asking.build_cases(plan, prompts, answers, judge_study.CARDS)
        judge_study.put(ChecklistJudge("checklist"), plan, cases, store)
        return store.path.read_text()


def priced(folder: Path) -> None:
    attempts.AttemptStore(folder / "store" / "conversations.jsonl")
    attempts.spent_usd(folder.parent)
    estimate.measured(folder / "store" / "conversations.jsonl", "m")


def store(folder: Path) -> None:
    path = folder / "judge-checklist" / "store" / "verdicts.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(store_text())


def ranked(folder: Path) -> None:
    found = VerdictStore(folder / "judge-checklist" / "store" / "verdicts.jsonl")
    rerank.report(rerank.rerank(found, draws=3), found)


def finished(folder: Path) -> None:
    facts = {
        "schema_version": 1, "step": "06_analysis", "scope": "study", "key": None, "key_parts": {}, "status": "ok",
        "executor": "papermill", "headline": "", "inputs": [],
        "outputs": [{"path": "a", "sha256": "0" * 64, "bytes": 1}],
        "exports": {"results.csv": "a"}, "environment": {}, "device": {}, "started_at": "2026-06-05", "seconds": 1.0,
        "parameters": {"epochs": 1},
    }  # fmt: skip
    record.write_manifest(folder / "study" / "06_analysis" / "manifest.json", facts)
    path = folder / "study" / "06_analysis" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))


def resealed(data: st.DataObject, text: str) -> bytes:
    """A changed manifest, half of them with a right seal."""
    value = changed(data, json.loads(text))
    if data.draw(st.booleans()) and isinstance(value, dict):
        with contextlib.suppress(RecursionError):
            value = manifest.sealed(value)
    return json.dumps(value).encode()


def current(folder: Path) -> None:
    found, reason = record.find_manifest(folder, "study", "06_analysis")
    record.export_again(folder, "study", "06_analysis")
    if found is None:
        raise InputFileError(reason)


def sealed_study(folder: Path) -> None:
    finished(folder)
    seal.seal_study(folder)
    path = folder / seal.SEAL_NAME
    path.write_text(json.dumps(json.loads(path.read_text())))


def checked_seal(folder: Path) -> None:
    if seal.check_seal(folder):
        raise InputFileError("differs")


def review_line() -> Path:
    return next((ROOT / "telco_nb" / "data" / "reviews").glob("*.jsonl"))


DATA = ROOT / "telco_nb" / "data"
KINDS = {
    "base": Kind(parameters, "params/base.yaml", yaml_text, plan),
    "profile": Kind(parameters, "params/profiles/smoke.yaml", yaml_text, plan),
    "lora": Kind(parameters, "params/lora/c07.yaml", yaml_text, plan),
    "judge": Kind(parameters, "params/judges/own-server.yaml", yaml_text, judge),
    "claims": Kind(
        copied(params.PARAMS_DIR / "claims.yaml"), "claims.yaml", yaml_text,
        lambda folder: params.load_claims(folder / "claims.yaml"),
    ),
    "card": Kind(
        copied(BANKING / "banking", BANKING / "banking_contexts.yaml"), "banking/overdraft.yaml", yaml_text, cards
    ),
    "contexts": Kind(
        copied(BANKING / "banking", BANKING / "banking_contexts.yaml"), "banking_contexts.yaml", yaml_text, cards
    ),
    "table": Kind(copied(BANKING / "banking_tables"), "banking_tables/problems.csv", csv_text, tables),
    "gold": Kind(
        first_lines(DATA / "conversations" / "apn.jsonl"), "apn.jsonl", json_lines,
        lambda folder: gold.load_gold(folder, shipped.grid()),
    ),
    "reviews": Kind(
        first_lines(review_line()), review_line().name, json_lines,
        lambda folder: gold.load_reviews(folder, shipped.grid()),
    ),
    "noisy": Kind(
        first_lines(DATA / "noisy.jsonl"), "noisy.jsonl", json_lines,
        lambda folder: gold.load_noisy(folder / "noisy.jsonl", shipped.grid()),
    ),
    "general": Kind(
        first_lines(DATA / "general.jsonl"), "general.jsonl", json_lines,
        lambda folder: choices.general_items(choices.load_general(folder / "general.jsonl")),
    ),
    "prompts": Kind(
        written("own.csv", PROMPTS), "own.csv", csv_text,
        lambda folder: gold.load_prompts(folder / "own.csv", shipped.cards()),
    ),
    "votes": Kind(
        written("votes.jsonl", VOTES), "votes.jsonl", json_lines,
        lambda folder: one_vote_each(read_votes(folder / "votes.jsonl")),
    ),
    "votes table": Kind(
        written("votes.CSV", VOTES_TABLE), "votes.CSV", csv_text,
        lambda folder: one_vote_each(read_votes(folder / "votes.CSV")),
    ),
    "key": Kind(
        written("votes/key.jsonl", KEY), "votes/key.jsonl", json_lines, blind_pairs.read_keys
    ),
    "store": Kind(store, "judge-checklist/store/verdicts.jsonl", json_lines, ranked),
    "attempts": Kind(written("store/conversations.jsonl", ATTEMPTS), "store/conversations.jsonl", json_lines, priced),
    "ledger": Kind(
        written("batches.jsonl", LEDGER), "batches.jsonl", json_lines,
        lambda folder: BatchLedger(folder / "batches.jsonl"),
    ),
    "manifest": Kind(finished, "study/06_analysis/manifest.json", resealed, current),
    "seal": Kind(sealed_study, "seal.json", resealed, checked_seal),
}  # fmt: skip
