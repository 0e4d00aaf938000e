"""Nothing leaves the house and no dollar is spent without somebody having said so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from telco_nb import ROOT
from telco_nb.commands import estimate as command
from telco_nb.commands.estimate import Corpus
from telco_nb.engine import runner
from telco_nb.engine.archive import Failure
from telco_nb.hosted import prices
from telco_nb.hosted.api import HostedModel
from telco_nb.hosted.prices import CostRefused, Estimate
from telco_nb.judge import protocol
from telco_nb.study.input_files import InputFileError
from telco_nb.study.params import load_study
from telco_nb.study.plan import plan_jobs

REMOTE = HostedModel("google", "gemini-2.5-flash")
LOCAL = HostedModel("openai-compatible", "own", "http://127.0.0.1:9/v1")


def estimate(model: HostedModel, usd: float | None = 10.0, calls: int = 100) -> Estimate:
    return Estimate(model, calls, 1000, 1000, usd, usd, usd, "table")


def test_data_goes_to_a_host_of_this_network_without_a_question_and_beyond_it_only_by_consent():
    prices.require_consent([estimate(LOCAL, None)], None, yes=False, ask=None)
    with pytest.raises(CostRefused, match=r"nothing was sent.*googleapis\.com.*--yes"):
        prices.require_consent([estimate(REMOTE)], None, yes=False, ask=None)
    with pytest.raises(CostRefused):
        prices.require_consent([estimate(REMOTE)], None, yes=False, ask=lambda: False)
    prices.require_consent([estimate(REMOTE)], None, yes=False, ask=lambda: True)
    prices.require_consent([estimate(REMOTE)], None, yes=True, ask=None)


def test_a_plan_that_is_expected_to_exceed_the_cap_is_refused_and_one_that_is_answered_already_is_not():
    with pytest.raises(CostRefused, match=r"\$20.00 are expected.*\$15.00"):
        prices.require_consent([estimate(REMOTE), estimate(REMOTE)], 15.0, yes=True, ask=None)
    prices.require_consent([estimate(REMOTE, calls=0)], 0.0, yes=False, ask=None)


def test_a_step_that_the_budget_ended_gives_exit_code_4_and_any_other_failure_1():
    stopped = SimpleNamespace(status="failed", failure=Failure("error", "CallsStopped: BudgetStop: $1.00 of $1.00", 3))
    broken = SimpleNamespace(status="failed", failure=Failure("error", "ValueError: no", 3))
    blocked = SimpleNamespace(status="blocked", failure=None)
    assert runner.exit_code([stopped, blocked], stopped=False) == 4
    assert runner.exit_code([stopped, broken], stopped=False) == 1


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        (["generator: google", "generator_model: gemini-2.5-flash"], [], "--yes"),
        (["generator: google", "generator_model: gemini-2.5-flash"], ["--yes", "--max-usd", "0.01"], "are expected"),
    ],
)
def test_the_command_line_refuses_with_exit_code_4_and_shows_host_calls_and_dollars(lines, options, said, tmp_path):
    done = run_all(lines, options, tmp_path)
    assert done.returncode == 4 and said in done.stderr
    assert "1,560 calls to gemini-2.5-flash at generativelanguage.googleapis.com" in done.stdout
    assert "genai-prices" in done.stdout and "no customer data" in done.stdout
    assert not list((tmp_path / "out").glob("*/*/*.ipynb"))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["generator: google"], "generator_model"),
        (["generator: openai-compatible", "generator_model: m"], "no endpoint"),
        (
            ["generator: openai-compatible", "generator_model: m", "generator_endpoint: http://u:p@127.0.0.1/v1"],
            "secret",
        ),
        (["generator: gemini"], "generator"),
    ],
)
def test_a_generator_that_cannot_be_asked_is_a_fault_of_the_parameters(lines, said, tmp_path):
    done = run_all(lines, ["--dry-run"], tmp_path)
    assert done.returncode == 2 and said in done.stderr and "u:p" not in done.stderr


def test_the_plan_prices_a_hosted_judge_from_the_protocol(tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    done = run_all(["judges: [checklist, claude-sonnet-4-5]"], ["--dry-run"], tmp_path, steps="01-06")
    assert done.returncode == 0 and "judge-claude-sonnet-4-5/05_judge" in done.stdout
    assert "calls to claude-sonnet-4-5 at api.anthropic.com" in done.stdout
    calls = int(re.search(r"([\d,]+) calls to claude", done.stdout)[1])
    ids = [str(i) for i in range(4 + 2 + 2)]  # the limits of smoke's three test sets
    prompts = pd.DataFrame({"prompt_id": ids, "scenario_id": ids, "term_id": ids})
    assert calls == protocol.count_questions(load_study("smoke").values("judge-claude-sonnet-4-5"), prompts)


@pytest.mark.parametrize(
    ("changed", "prompts"),
    [
        ({}, 144 + 144 + 120),
        ({"test_prompts": 5, "noisy_prompts": 0, "unseen_prompts": 500}, 5 + 0 + 120),
        ({"noisy_path": None, "unseen_terms": []}, 156),
    ],
)
def test_all_test_sets_count_as_prompts_up_to_their_limits(changed, prompts):
    assert Corpus(load_study("paper").values("shared") | changed).count_prompts() == prompts


def test_what_is_gold_is_not_written_again_and_gives_the_lengths_and_without_gold_the_variants_do():
    values = load_study("paper").values("shared") | {"conversations_per_scenario": 3}
    own = Corpus(values | {"gold_path": None})
    for corpus, numbers, origin in ((Corpus(values), [1, 2], "gold"), (own, [0, 1, 2], "variant")):
        assert {row["origin"] for row in corpus.sample()} == {origin} and len(corpus.sample()) >= 40
        assert all([item.number for call in calls for item in call.items] == numbers for calls in corpus.planned())


CARD = "id: own\nterm: Own\n"
GOOD_PROMPTS = '{"prompt": "My phone is dead."}\n'
OWN = [
    ("glossary_path: {}/cards", "cards/own.yaml", "id: [", "own.yaml"),
    ("glossary_path: {}/cards", "cards/own.yaml", CARD, "own.yaml"),
    ("contexts_path: {}/contexts.yaml", "contexts.yaml", "contexts: 5", "contexts.yaml"),
    ("noisy_path: {}/noisy.jsonl", "noisy.jsonl", '{"id": "no.such.scenario"}', "noisy.jsonl, line 1"),
    ("prompts_path: {}/own.jsonl", "own.jsonl", GOOD_PROMPTS + "5", "own.jsonl, line 2"),
    ("reviews_path: {}/reviews", "reviews/dns.jsonl", "{", "dns.jsonl, line 1"),
    ("general_path: {}/general.jsonl", "general.jsonl", '{"id": 1}', "general.jsonl, line 1"),
]


@pytest.mark.parametrize(("line", "name", "text", "said"), OWN, ids=[name for _, name, _, _ in OWN])
def test_the_plan_finds_a_fault_in_data_of_ones_own_with_the_offline_generator_too(line, name, text, said, tmp_path):
    (tmp_path / "own" / name).parent.mkdir(parents=True)
    (tmp_path / "own" / name).write_text(text)
    jobs = own_jobs(line.format(tmp_path / "own"))
    with pytest.raises(InputFileError, match=re.escape(said)):
        command.read_own_data(jobs)


def own_jobs(line: str) -> list:
    study = load_study("smoke")
    name, _, value = line.partition(": ")
    study.base[name] = value
    return plan_jobs(study)


def test_the_plan_reads_no_shipped_data_and_takes_good_data_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own.jsonl").write_text(GOOD_PROMPTS)
    command.read_own_data(own_jobs(f"prompts_path: {tmp_path / 'own.jsonl'}"))
    monkeypatch.setattr(command, "Corpus", lambda values: pytest.fail("read"))
    command.read_own_data(plan_jobs(load_study("smoke")))


def test_a_dry_run_with_a_faulty_glossary_is_exit_code_2(tmp_path):
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "own.yaml").write_text("id: [")
    done = run_all([f"glossary_path: {tmp_path / 'cards'}"], ["--dry-run"], tmp_path)
    assert done.returncode == 2 and "own.yaml, line" in done.stderr and "Traceback" not in done.stderr


def run_all(lines: list[str], options: list[str], tmp_path, steps: str = "01-02") -> subprocess.CompletedProcess:
    shutil.copytree(ROOT / "params", tmp_path / "params")
    with (tmp_path / "params" / "profiles" / "smoke.yaml").open("a") as stream:
        stream.write("\n".join(["", *lines, ""]))
    command = [sys.executable, "run_all.py", "--profile", "smoke", "--params", str(tmp_path / "params")]
    command += ["--outputs", str(tmp_path / "out"), "--steps", steps, *options]
    env = os.environ | {"GOOGLE_API_KEY": "none", "COLUMNS": "300"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
