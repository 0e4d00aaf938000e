"""Batch mode: submit, poll and collect can each be repeated, and nothing is paid twice or lost."""

from __future__ import annotations

import json
import re
import shutil
import traceback

import judge_study
import matplotlib
import pandas as pd
import pytest
from batch_servers import AnthropicBatches, OpenAIBatches
from hosted_fixtures import GOOD, SECRET, Verdict, keys, lines  # noqa: F401
from provider_server import Server
from typer.testing import CliRunner

from telco_nb import ROOT
from telco_nb.__main__ import app
from telco_nb.commands import batch
from telco_nb.commands.batch import _act, _generator_work, _run, collect, judge_work, poll, submit
from telco_nb.commands.common import CommandError
from telco_nb.hosted import api, attempts, prices
from telco_nb.hosted.api import ApiClient, HostedModel, Request
from telco_nb.hosted.ledger import BatchLedger
from telco_nb.hosted.session import CallsStopped, Session, run_async
from telco_nb.judge import cases, protocol
from telco_nb.judge.prompts import neutralise
from telco_nb.judge.store import FIELDS, VerdictStore
from telco_nb.study import params
from telco_nb.study.content_key import content_key
from telco_nb.study.plan import declared, make_job

matplotlib.use("Agg")


@pytest.fixture
def server():
    found = AnthropicBatches()
    yield found
    found.http.shutdown()
    found.http.server_close()


QUESTIONS = [Request(f"{i:064x}", "You compare.", f"Which? ({i})", Verdict) for i in range(7)]


ANTHROPIC, OPENAI = ("anthropic", "claude-sonnet-4-5"), ("openai", "gpt-5.2")


def act(server, folder, step, *arguments, max_usd=None, of=ANTHROPIC):
    """One command in what might be a process of its own: everything is read from disk again."""
    model = HostedModel(*of, server.url, max_tokens=50)
    store = attempts.AttemptStore(folder / "a.jsonl")
    price = prices.Prices(model, factor=prices.BATCH_FACTOR)
    session = Session(ApiClient(model, batch=True), store, price, prices.Budget(max_usd, store.spent_usd))
    return _run(session, step(session, *arguments))


def test_a_mistake_of_our_own_is_no_failure_of_the_provider(server, tmp_path, monkeypatch):
    def mistake(*_):
        raise LookupError("ours")

    monkeypatch.setattr("telco_nb.hosted.api.request_parameters", mistake)
    with pytest.raises(LookupError, match="ours"):
        act(server, tmp_path, submit, QUESTIONS)


@pytest.mark.parametrize("step", [submit, poll, collect], ids=lambda step: step.__name__)
def test_a_reply_that_trickles_ends_every_call_of_a_batch_and_the_next_one_goes_on(server, tmp_path, monkeypatch, step):
    if step is not submit:
        assert act(server, tmp_path, submit, QUESTIONS) == 7
    arguments = () if step is poll else (QUESTIONS,)
    server.trickles, server.ended = True, True
    monkeypatch.setattr(batch, "DEADLINE_S", 0.5)
    with pytest.raises(
        CallsStopped, match=r"127\.0\.0\.1:\d+ did not end its reply within 0 s\. Run it again"
    ) as stopped:
        act(server, tmp_path, step, *arguments)
    assert stopped.value.status == "timeout" and len(server.created) == 1
    server.trickles = False
    if step is submit:
        with pytest.raises(CommandError, match="may exist"):
            act(server, tmp_path, submit, QUESTIONS)
    else:
        assert act(server, tmp_path, collect, QUESTIONS) == {"ok": 7}


def test_submit_poll_collect_can_each_be_repeated_and_every_question_is_paid_once_at_half_price(server, tmp_path):
    assert act(server, tmp_path, submit, QUESTIONS) == 7
    assert act(server, tmp_path, submit, QUESTIONS) == 0
    assert "in_progress" in act(server, tmp_path, poll)[0]
    assert act(server, tmp_path, collect, QUESTIONS) == {}
    server.ended = True
    assert act(server, tmp_path, collect, QUESTIONS) == {"ok": 7}
    assert act(server, tmp_path, collect, QUESTIONS) == {}
    assert act(server, tmp_path, submit, QUESTIONS) == 0 and len(server.created) == 1
    stored = lines(tmp_path / "a.jsonl")
    assert [line["call_id"] for line in stored] == [q.id for q in QUESTIONS]
    live = prices.Prices(HostedModel("anthropic", "claude-sonnet-4-5")).of_tokens
    assert live(100, 20) is not None and all(0 < line["usd"] < live(140, 20) for line in stored)
    assert {line["batch_id"] for line in stored} == {"msgbatch_0"}


def test_what_failed_in_a_batch_has_its_status_and_is_submitted_again(server, tmp_path):
    fates = dict(zip([q.id for q in QUESTIONS], ["errored", "expired", "canceled", "unreadable"], strict=False))
    server.fates, server.ended = fates, True
    act(server, tmp_path, submit, QUESTIONS)
    counts = act(server, tmp_path, collect, QUESTIONS)
    assert counts["ok"] == 3 and counts["parse_error"] == 1 and sum(counts.values()) == 7
    server.fates = {}
    assert act(server, tmp_path, submit, QUESTIONS) == 4
    assert act(server, tmp_path, collect, QUESTIONS) == {"ok": 4}
    assert len(attempts.AttemptStore(tmp_path / "a.jsonl").ok) == 7


def test_a_batch_of_unknown_fate_is_never_submitted_again_unseen(server, tmp_path):
    server.refuse_create = True
    with pytest.raises(Exception, match=r"."):
        act(server, tmp_path, submit, QUESTIONS)
    server.refuse_create = False
    assert len(server.created) == 1
    with pytest.raises(CommandError, match="may exist at the provider"):
        act(server, tmp_path, submit, QUESTIONS)
    assert "unknown" in act(server, tmp_path, poll)[0]
    BatchLedger(tmp_path / "batches.jsonl").close(0, "forgotten")
    assert act(server, tmp_path, submit, QUESTIONS) == 7


def test_a_collection_that_was_killed_half_way_goes_on_without_doubling_a_line(server, tmp_path):
    server.ended = True
    act(server, tmp_path, submit, QUESTIONS)
    act(server, tmp_path, collect, QUESTIONS)
    path, ledger = tmp_path / "a.jsonl", tmp_path / "batches.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))  # not noted as collected
    assert act(server, tmp_path, collect, QUESTIONS) == {"ok": 4}
    assert sorted(line["call_id"] for line in lines(path)) == [q.id for q in QUESTIONS]


def test_no_more_is_submitted_than_the_budget_allows_in_the_worst_case(server, tmp_path):
    with pytest.raises(prices.BudgetStop):
        act(server, tmp_path, submit, QUESTIONS, max_usd=0.001)
    assert not server.created
    worst = prices.Prices(HostedModel(*ANTHROPIC, max_tokens=50), factor=0.5).worst_case(QUESTIONS[0])
    assert act(server, tmp_path, submit, QUESTIONS, max_usd=3.5 * worst) == 3  # as many as the cap allows
    server.ended = True
    assert act(server, tmp_path, collect, QUESTIONS) == {"ok": 3}
    assert act(server, tmp_path, submit, QUESTIONS, max_usd=1.0) == 4


def test_openai_takes_batches_in_another_protocol_with_the_same_lines_and_keeps_no_answers(tmp_path):
    server = OpenAIBatches()
    server.refused = {QUESTIONS[0].id}
    assert act(server, tmp_path, submit, QUESTIONS, of=OPENAI) == 7
    assert act(server, tmp_path, collect, QUESTIONS, of=OPENAI) == {"ok": 6, "refusal": 1}
    server.http.shutdown()
    server.http.server_close()
    sent = [request["body"] for request in server.requests]
    assert all(body["store"] is False and "margin" in json.dumps(body["text"]["format"]) for body in sent)
    good = lines(tmp_path / "a.jsonl")[1:]
    half = prices.Prices(HostedModel("openai", "gpt-5.2"), factor=0.5).of_tokens(140, 20)
    assert all(line["output"] == json.loads(GOOD) and 0 < line["usd"] < half for line in good)
    assert {(line["tokens_in"], line["tokens_cached"], line["finish_reason"]) for line in good} == {
        (140, 40, "completed")
    }


def test_a_result_that_no_sdk_can_read_has_a_status_and_counts_at_its_worst_case(server, tmp_path):
    server.fates, server.ended = {QUESTIONS[0].id: "odd"}, True
    act(server, tmp_path, submit, QUESTIONS, max_usd=1.0)
    assert act(server, tmp_path, collect, QUESTIONS) == {"ok": 6, "provider_error": 1}
    odd = next(line for line in lines(tmp_path / "a.jsonl") if line["call_id"] == QUESTIONS[0].id)
    price = prices.Prices(HostedModel(*ANTHROPIC, server.url, max_tokens=50), factor=prices.BATCH_FACTOR)
    assert odd["usd"] is None and odd["usd_at_most"] == pytest.approx(price.worst_case(QUESTIONS[0]))


@pytest.mark.parametrize("step", [poll, lambda session: collect(session, QUESTIONS)])
def test_an_error_of_the_provider_ends_a_command_in_one_printable_line_without_the_key(step, server, tmp_path):
    act(server, tmp_path, submit, QUESTIONS)
    server.error = "x" * 350 + SECRET + "\x1b[2J" + SECRET
    with pytest.raises(CallsStopped) as stopped:
        act(server, tmp_path, step)
    said = "".join(traceback.format_exception(stopped.value))
    assert SECRET[:8] not in said
    assert "[key]" in said and str(stopped.value).isprintable()
    assert BatchLedger(tmp_path / "batches.jsonl").under_way == {question.id for question in QUESTIONS}


def test_results_at_another_host_are_not_fetched(server, tmp_path, monkeypatch):
    act(server, tmp_path, submit, QUESTIONS)
    server.ended = True
    job = server.job
    monkeypatch.setattr(server, "job", lambda batch: job(batch) | {"results_url": "http://127.0.0.2:9/results"})
    with pytest.raises(CallsStopped, match="only 127"):
        act(server, tmp_path, collect, QUESTIONS)


def test_what_is_under_way_in_a_batch_is_not_asked_live_as_well(server, tmp_path):
    act(server, tmp_path, submit, QUESTIONS[:1])
    model = HostedModel("anthropic", "claude-sonnet-4-5", server.url)
    store = attempts.AttemptStore(tmp_path / "a.jsonl")
    session = Session(ApiClient(model), store, prices.Prices(model), prices.Budget(None))
    with pytest.raises(CallsStopped, match="telco_nb batch collect"):
        session.run([lambda: session.ask(QUESTIONS[0])])
    assert not store.attempts


def test_a_provider_without_batches_says_so(tmp_path):
    model = HostedModel("openai-compatible", "own", "http://127.0.0.1:9/v1")
    store = attempts.AttemptStore(tmp_path / "a.jsonl")
    session = Session(ApiClient(model), store, prices.Prices(model), prices.Budget(None))
    with pytest.raises(CommandError, match="no batches"):
        run_async(lambda: submit(session, QUESTIONS))


# ---------------------------------------------------------------- the generator


def test_of_each_scenario_one_request_is_due_and_the_next_one_is_told_the_first_lines_of_its_answer(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path / "out"))
    shutil.copytree(ROOT / "params", tmp_path / "params")
    with (tmp_path / "params" / "profiles" / "paper.yaml").open("a") as stream:
        stream.write("\ngenerator: anthropic\ngenerator_model: claude-sonnet-4-5\n")
    work = _generator_work("paper", tmp_path / "params", None)
    assert len(work.every) == 6240 and work.due == work.every[::4]
    line = dict.fromkeys(api.RECEIPT) | {"call_id": work.due[0].id, "status": "ok"}
    said = {"manner": "plain", "messages": [{"role": "user", "content": "My line is dead."}]}
    work.session.store.append([line | {"output": {"conversations": [said]}}])
    after = _generator_work("paper", tmp_path / "params", None)
    assert [r.id for r in after.due] == [work.every[1].id, *(r.id for r in work.due[1:])]
    assert "- My line is dead.\n" in after.due[0].prompt


# ---------------------------------------------------------------- judges

CONFIGS = ["c01", "c02", "c03"]


def verdict_on(sent: dict, references: dict[str, str]) -> str:
    """What a judge that passes its gate says: the reference to this customer's words wins, and all else is even."""
    text = json.dumps(sent["messages"], ensure_ascii=False)
    answers = [body.strip() for body in re.findall(r"<answer_\w>\\n(.*?)\\n</answer_\w>", text)]
    said: dict = {"analysis": "x"}
    if len(answers) == 1:
        said |= dict.fromkeys(cases.CRITERIA, 4)
    else:
        won = [seat for seat, answer in zip("AB", answers, strict=True) if references.get(answer, "?!") in text]
        said |= {"verdict": won[0] if len(won) == 1 else "tie", "margin": len(won) % 2, "flags": []}
    return json.dumps(said)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return judge_study.build(tmp_path_factory.mktemp("judged"), 6, CONFIGS)


@pytest.fixture
def judged(built, server, tmp_path):
    """A study's folder, and the parameters of its judge in batches at the server."""
    root = shutil.copytree(built, tmp_path / "smoke")
    prompts = pd.read_parquet(root / "shared" / "02_synth" / "artefacts" / "test_prompts.parquet")
    references = {neutralise(row.reference): row.messages[-1]["content"] for row in prompts.itertuples()}
    server.answer, server.ended = lambda sent: verdict_on(sent, references), True
    named = {"scope": "judge-jury", "judge": "jury", "judge_kind": "anthropic", "judge_model": "claude-sonnet-4-5"}
    more = {"configs": CONFIGS, "judge_endpoint": server.url, "bootstrap_draws": 100, "rubric_share": 0.5}
    return root, declared("05_judge") | named | more


def step(root, values, action, capsys) -> str:
    """One command, as of a process of its own; what it printed."""
    _act(action, judge_work(protocol.open_protocol(values, root)), True)
    return capsys.readouterr().out


def test_a_judge_in_batches_is_asked_its_gate_first_then_all_the_rest_and_05_finds_its_verdicts(
    judged, server, capsys, monkeypatch
):
    root, values = judged
    assert "the gate first" in step(root, values, "submit", capsys)
    assert "submitted: 0" in step(root, values, "submit", capsys)  # under way, and so is the gate
    path = protocol.store_path(root, "jury")
    gate = {request["custom_id"] for request in server.created["msgbatch_0"]}
    asked = protocol.open_protocol(values, root)
    assert gate == {question.id for question in asked.questions("controls")}
    under_way = attempts.spent_usd(root)
    step(root, values, "collect", capsys)
    spent = VerdictStore(path).spent_usd
    assert attempts.spent_usd(root) == pytest.approx(spent) and 0 < spent < under_way
    assert "the gate passed" in step(root, values, "submit", capsys)
    assert "ok" in step(root, values, "collect", capsys) and "submitted: 0" in step(root, values, "submit", capsys)
    stored = lines(path)
    assert {line["judgement_id"] for line in stored} == {question.id for question in asked.every}
    assert all(set(FIELDS) <= set(line) for line in stored) and len(server.created) == 2
    live = prices.Prices(HostedModel("anthropic", "claude-sonnet-4-5")).of_tokens(140, 20)
    assert all(line["batch_id"] and 0 < line["usd"] < live / 2 and line["tokens_out"] == 20 for line in stored)
    folder, _ = judge_study.run_judge(root, monkeypatch, **values)
    metrics = json.loads((folder / "05_judge" / "metrics.json").read_text())
    assert metrics["gate_passed"] and metrics["coverage"] == 1.0 and len(server.created) == 2
    assert [line for line in lines(path) if "plan" not in line] == stored  # nothing more was asked


def test_nothing_more_is_submitted_for_a_judge_that_failed_its_gate_unless_told_to(judged, server, capsys):
    root, values = judged
    server.answer = lambda sent: json.dumps({"analysis": "x", "verdict": "A", "margin": 1, "flags": []})
    step(root, values, "submit", capsys)
    step(root, values, "collect", capsys)
    said = step(root, values, "submit", capsys)
    assert "the gate failed (" in said and "submitted: 0" in said and len(server.created) == 1
    step(root, values | {"judge_after_failed_gate": True}, "submit", capsys)
    assert len(server.created) == 2


def test_results_of_questions_that_the_study_no_longer_asks_are_counted_and_not_stored(server, tmp_path):
    server.ended = True
    act(server, tmp_path, submit, QUESTIONS)
    assert act(server, tmp_path, collect, QUESTIONS[:5]) == {"ok": 5, "not asked any more": 2}


# ---------------------------------------------------------------- the next run


def asked_live(work, request) -> None:
    """The request is asked as a run asks it, at another server, and each reply stored where a batch stores its own."""
    with Server("anthropic", lambda body, n: GOOD) as live:
        client = ApiClient(HostedModel(*ANTHROPIC, live.url))
        session = work.session
        asking = Session(client, session.store, session.prices, session.budget, line=session.make_line)
        asking.run([lambda: asking.ask(request)])
    assert session.store.attempts[request.id] == len(live.requests) > 0


def test_replies_collected_from_a_batch_put_02_out_of_date_and_what_a_run_asks_itself_does_not(
    built, server, tmp_path, monkeypatch
):
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path / "out"))
    root = shutil.copytree(built, tmp_path / "out" / "smoke")
    folder = shutil.copytree(ROOT / "params", tmp_path / "params")
    with (folder / "profiles" / "smoke.yaml").open("a") as stream:
        stream.write(f"\ngenerator: anthropic\ngenerator_model: {ANTHROPIC[1]}\ngenerator_endpoint: {server.url}\n")
    job = make_job("02_synth", params.load_study("smoke", folder).values("shared"))
    before = content_key(job, root)[0]
    work = _generator_work("smoke", folder, None)
    asked_live(work, work.due[-1])
    assert content_key(job, root)[0] == before is not None
    _act("submit", work._replace(due=work.due[:3]), True)
    assert content_key(job, root)[0] == before, "nothing has come back yet"
    server.ended = True
    _act("collect", _generator_work("smoke", folder, None), True)
    assert content_key(job, root)[0] not in (before, None)


def test_verdicts_collected_from_a_batch_put_05_out_of_date_and_what_a_run_asks_itself_does_not(
    judged, capsys, monkeypatch
):
    root, values = judged
    job = make_job("05_judge", values)
    before = content_key(job, root)[0]
    work = judge_work(protocol.open_protocol(values, root))
    asked_live(work, work.due[-1])
    step(root, values, "submit", capsys)
    assert content_key(job, root)[0] == before is not None
    step(root, values, "collect", capsys)
    gate = content_key(job, root)[0]
    step(root, values, "submit", capsys)
    step(root, values, "collect", capsys)
    rest = content_key(job, root)[0]
    judge_study.run_judge(root, monkeypatch, **values)
    assert len({before, gate, rest}) == 3 and content_key(job, root)[0] == rest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["batch", "submit", "--judge", "nobody"], "no nobody.yaml. Known: checklist"),
        (["batch", "submit", "--judge", "claude-sonnet-4-5"], "has to run first"),
        (["batch", "collect", "--judge", "claude-sonnet-4-5"], "holds no answers"),
        (["batch", "collect", "--judge", "checklist"], "is not asked over HTTP"),
        (["batch", "poll"], "the generator is offline"),
        (["pilot", "--judge", "claude-sonnet-4-5"], "has to run first"),
    ],
)
def test_a_command_for_which_there_is_nothing_says_why_with_exit_code_2(arguments, said, tmp_path, monkeypatch):
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path))
    ended = CliRunner().invoke(app, [*arguments, "--profile", "smoke"])
    assert ended.exit_code == 2 and said in ended.stderr
