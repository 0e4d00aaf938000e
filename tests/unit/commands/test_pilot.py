"""The pilot asks the first questions for real, and what they took prices all others; nothing is paid twice."""

from __future__ import annotations

import itertools
import json

import judge_study
import matplotlib
import pytest
from hosted_fixtures import keys, lines  # noqa: F401
from provider_server import Server, answer_body

from telco_nb.commands import estimate, pilot
from telco_nb.hosted import prices
from telco_nb.judge import panel, protocol
from telco_nb.study import params, record, seal
from telco_nb.study.plan import declared, make_job, plan_jobs

matplotlib.use("Agg")
CONFIGS = ["c01", "c02", "c03"]
PAIR = json.dumps({"analysis": "A says more.", "verdict": "A", "margin": 1, "flags": []})


@pytest.fixture
def served(tmp_path):
    """(a study's folder, its judge's parameters, the server): every answer takes 900 or 1,100 tokens in, 20 out."""
    lengths = itertools.cycle((900, 1100))

    def script(body: dict, n: int) -> tuple[int, dict, dict]:
        usage = {"prompt_tokens": next(lengths), "completion_tokens": 20, "total_tokens": 0}
        return 200, {}, answer_body("openai-compatible", "own", PAIR) | {"usage": usage}

    with Server("openai-compatible", script) as server:
        root = judge_study.build(tmp_path / "outputs", 6, CONFIGS)
        named = {"scope": "judge-own", "judge": "own", "judge_kind": "openai-compatible", "judge_model": "own"}
        more = {"configs": CONFIGS, "judge_endpoint": server.url, "bootstrap_draws": 100, "rubric_share": 0.0}
        priced = {"judge_input_usd_per_mtok": 1.0, "judge_output_usd_per_mtok": 2.0}
        yield root, declared("05_judge") | named | more | priced, server


def test_twenty_calls_price_the_whole_plan_and_05_asks_only_the_others(served, monkeypatch):
    root, values, server = served
    assert pilot.ask(protocol.open_protocol(values, root), 20) == len(server.requests) == 20
    asked = protocol.open_protocol(values, root)
    assert len(asked.store.ok) == 20 and set(asked.store.ok) <= {q.id for q in asked.questions("controls")}
    half = 2.093 * 100 * (20 / 19) ** 0.5 / 20**0.5  # t with 19 degrees of freedom
    (low, mid, high), out = estimate.measured(asked.store.path, "own")
    assert (low, mid, high) == pytest.approx((1000 - half, 1000, 1000 + half), rel=1e-3) and out == (20, 20, 20)
    n = len(asked.every)
    whole = estimate.estimate_questions(asked.judge, asked.every, asked.store.path)
    assert (
        whole.usd_mid == pytest.approx(n * (1000 * 1.0 + 20 * 2.0) / 1e6)
        and whole.usd_low < whole.usd_mid < whole.usd_high
    )
    said = pilot.report(asked)
    assert "1,000 [952, 1,048]" in said and f"the whole plan: {n} calls" in said and f"yet: {n - 20} calls" in said
    judge_study.run_judge(root, monkeypatch, **values | {"judge_after_failed_gate": True})
    assert len(server.requests) == n
    logged = lines(root / "egress.jsonl")
    answered = [line for line in logged if line["status"] == 200]  # a dropped connection is logged as well
    assert len(answered) == n and {line["purpose"] for line in logged} == {"judge"}


def test_the_plan_of_a_run_counts_with_the_measured_lengths(served):
    root, values, _ = served
    plan = plan_jobs(params.load_study("smoke"))
    job = make_job("05_judge", values)
    model = panel.open_judge(values, root).hosted_model
    assumed, _ = estimate.estimate_job(job, model, plan, root)
    pilot.ask(protocol.open_protocol(values, root), 20)
    measured, sent = estimate.estimate_job(job, model, plan, root)
    assert measured.calls == assumed.calls - 20 and measured.tokens_in == 1000 * measured.calls
    assert assumed.tokens_in != 1000 * assumed.calls and "answers" in sent


def test_a_pilot_is_not_sent_beyond_this_network_without_consent_nor_over_the_cap(served, monkeypatch):
    root, values, server = served
    with pytest.raises(prices.CostRefused, match="are expected"):
        pilot.ask(protocol.open_protocol(values, root), 20, max_usd=0.001)
    remote = values | {"judge_kind": "openai", "judge_model": "gpt-5.2", "judge_endpoint": None}
    with pytest.raises(prices.CostRefused, match=r"nothing was sent.*api\.openai\.com"):
        pilot.ask(protocol.open_protocol(remote, root), 20)
    assert not server.requests


def test_after_a_failed_gate_the_pilot_asks_nothing_more(served):
    root, values, server = served
    gate = protocol.open_protocol(values, root).questions("controls")
    assert pilot.ask(protocol.open_protocol(values, root), 1000) == len(gate) == len(server.requests)
    assert pilot.ask(protocol.open_protocol(values, root), 1000) == 0  # it always takes the first seat


@pytest.mark.parametrize("name", ["verdicts.jsonl", "batches.jsonl"])
def test_a_judge_whose_sealed_lines_were_changed_is_asked_nothing_by_pilot_and_batches(served, name):
    root, values, server = served
    path = protocol.store_path(root, "own").with_name(name)
    path.parent.mkdir(parents=True)
    path.write_text('{"event": "submitting", "ids": [], "usd_at_most": 0.1, "status": "ok", "judgement_id": "a"}\n')
    seal.seal_study(root)
    protocol.open_protocol(values, root)
    path.write_text(path.read_text().replace("0.1", "0.0"))
    with pytest.raises(record.RecordError, match=rf"judge-own/store/{name} was changed"):
        protocol.open_protocol(values, root)
    assert not server.requests
