"""Data go to the named host alone, whatever the environment says; each call is on record; and it can be forbidden."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from hosted_fixtures import GOOD, MODELS, QUICK, SECRET, Verdict, keys, lines  # noqa: F401
from huggingface_hub.utils._http import default_client_factory
from provider_server import KINDS, Server
from rich.console import Console
from typer.testing import CliRunner

from telco_nb import ROOT, notebook
from telco_nb.__main__ import app
from telco_nb.engine import schedule
from telco_nb.hosted import attempts, egress, hosts, prices
from telco_nb.hosted.api import ApiClient, HostedModel, Request, Response
from telco_nb.hosted.hosts import parse_address
from telco_nb.hosted.session import Session, run_async
from telco_nb.hosted.transport import GuardedTransport
from telco_nb.study import params
from telco_nb.study.params import ParameterError
from telco_nb.study.record import JOB_VARIABLE

QUESTION = Request("q", "You compare two answers.", "Which is better?", Verdict)


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    """Nothing is forbidden, and what a test forbids is forgotten after it."""
    monkeypatch.setenv(egress.NO_EGRESS, "")
    monkeypatch.setenv(egress.AGREED, "")
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", ""))
    for name in egress.ignored_variables():
        monkeypatch.delenv(name)


HOSTS = ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "GOOGLE_GEMINI_BASE_URL", "GOOGLE_VERTEX_BASE_URL")


def ask(server: Server, store, purpose: str = "judge") -> Session:
    model = HostedModel(server.kind, MODELS[server.kind], server.url, timeout_s=5.0, purpose=purpose)
    client = ApiClient(model)
    asking = Session(client, attempts.AttemptStore(store), prices.Prices(model), prices.Budget(None))
    asking.run([lambda: asking.ask(QUESTION)])
    return asking


def session_with(url: str, folder) -> Session:
    """A session with a server that cannot be reached."""
    client = ApiClient(HostedModel("openai-compatible", "own", url, timeout_s=1.0, parameter="judge_endpoint"))

    async def fail(*_):
        return Response("provider_error", error="cannot be reached")

    client.ask = fail
    price = prices.Prices(client.hosted_model, 1.0, 1.0)
    return Session(client, attempts.AttemptStore(folder / "a.jsonl"), price, prices.Budget(1.0), retry_policy=QUICK)


# ---------------------------------------------------------------- the log


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_is_a_line_of_the_study_with_its_host_bytes_purpose_and_hash_and_without_text_or_key(kind, tmp_path):
    with Server(kind, lambda body, n: "429" if n == 1 else GOOD) as server:
        ask(server, tmp_path / "study" / "judge-x" / "store" / "verdicts.jsonl")
    logged = lines(tmp_path / "study" / "egress.jsonl")
    assert [line["status"] for line in logged] == [429, 200] and len(server.bodies) == 2
    for line, body in zip(logged, server.bodies, strict=True):
        assert set(line) == {"time", "host", "reach", "purpose", "bytes_out", "sha256", "bytes_in", "status"}
        assert (line["bytes_out"], line["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
        assert (line["host"], line["reach"], line["purpose"]) == (server.url.split("/")[2], "machine", "judge")
        assert line["bytes_in"] > 10 and line["time"].endswith("+00:00")
    text = (tmp_path / "study" / "egress.jsonl").read_text()
    assert SECRET not in text and "better" not in text and "verdict" not in text


def test_a_call_without_a_reply_is_on_record_too(tmp_path):
    with Server("openai", lambda body, n: GOOD) as server:
        url = server.url
    model = HostedModel("openai", "gpt-5.2", url, timeout_s=5.0)
    client = ApiClient(model)
    asking = Session(client, attempts.AttemptStore(tmp_path / "a.jsonl"), prices.Prices(model), prices.Budget(None))
    run_async(lambda: client.ask(QUESTION))
    (line,) = lines(tmp_path / "egress.jsonl")
    assert line["status"] is None and line["bytes_in"] == 0 and line["bytes_out"] > 0 and asking.ledger.batches == []


def test_half_a_line_that_a_full_disk_has_left_spoils_no_other(tmp_path):
    path, call = tmp_path / egress.CALLS, egress.Call.now("localhost", "machine", "judge", b"x")
    for _ in range(2):
        with egress.open_log(path) as note:
            note(call)
    whole = path.read_bytes().splitlines()[0]
    path.write_bytes(whole + b"\n" + whole[:40])
    with egress.open_log(path) as note:
        note(call)
    assert path.read_bytes().splitlines() == [whole, whole[:40], whole]


def test_nothing_is_sent_if_it_cannot_be_put_on_record_and_it_costs_nothing(tmp_path):
    (tmp_path / "egress.jsonl").mkdir()
    with Server("openai", lambda body, n: GOOD) as server:
        client = ApiClient(HostedModel("openai", "gpt-5.2", server.url, timeout_s=5.0))
        client.transport.log = tmp_path / "egress.jsonl"
        response = run_async(lambda: client.ask(QUESTION))
    assert not server.requests and response.status == "provider_error" and not response.may_be_billed
    assert "egress.jsonl cannot be written" in str(response.error)


class Hub(BaseHTTPRequestHandler):
    """One file of a model, which another path of this server holds."""

    def do_GET(self) -> None:
        body, moved = b'{"model_type": "llama"}', "/resolve/" in self.path
        self.send_response(302 if moved else 200)
        facts = {"Location": "/cdn/file"} if moved else {}
        facts |= {"ETag": '"e1"', "X-Repo-Commit": "0" * 40, "Content-Length": str(0 if moved else len(body))}
        for name, value in facts.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and not moved:
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


def test_what_is_fetched_from_a_hub_is_on_record_with_every_host_on_the_way(tmp_path, monkeypatch):
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    try:
        egress.log_hub(tmp_path)
        file = huggingface_hub.hf_hub_download(
            "own/model", "config.json", endpoint=f"http://{host}", cache_dir=tmp_path
        )
    finally:
        huggingface_hub.set_client_factory(default_client_factory)
        server.shutdown()
        server.server_close()
    assert json.loads(Path(file).read_text()) == {"model_type": "llama"} and constants.HF_HUB_DISABLE_XET
    logged = lines(tmp_path / "egress.jsonl")
    assert {(line["host"], line["purpose"], line["reach"]) for line in logged} == {(host, "base model", "machine")}
    assert {302, 200} <= {line["status"] for line in logged} and max(line["bytes_in"] for line in logged) == 23
    assert "config.json" not in (tmp_path / "egress.jsonl").read_text()


# ---------------------------------------------------------------- one host


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/v1", "https://127.0.0.1:8000/v1", "http://evil.example:8000/", "http://127.0.0.2:8000/"]
)
def test_no_request_of_an_sdk_goes_to_another_host_port_or_scheme(url):
    transport = GuardedTransport(parse_address("http://127.0.0.1:8000/v1"), "test")

    async def send() -> None:
        async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:
            await client.post(url, json={})

    with pytest.raises(httpx2.UnsupportedProtocol, match="only 127"):
        run_async(send)


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_leads_elsewhere_when_it_is_asked_gets_nothing_and_costs_nothing(kind, monkeypatch):
    with Server(kind, lambda body, n: GOOD) as server:
        model = HostedModel(kind, MODELS[kind], server.url.replace("127.0.0.1", "localhost"), timeout_s=5.0)
        assert model.address.reach == "machine"
        monkeypatch.setattr(hosts, "reach", lambda host: "remote")  # as if another address answered from now on
        response = run_async(lambda: ApiClient(model).ask(QUESTION))
        assert not server.requests
    assert response.status == "provider_error" and not response.may_be_billed
    assert "now leads to 127.0.0.1, was within this machine" in str(response.error)


@pytest.mark.parametrize("kind", KINDS)
def test_no_variable_of_the_environment_changes_where_a_request_goes_or_what_it_says_of_the_account(
    kind, tmp_path, monkeypatch
):
    with Server(kind, lambda body, n: GOOD) as server, Server(kind, lambda body, n: GOOD) as elsewhere:
        for name in egress.PROXIES:
            monkeypatch.setenv(name, elsewhere.url)
            monkeypatch.setenv(name.lower(), elsewhere.url)
        for name in HOSTS:
            monkeypatch.setenv(name, elsewhere.url)
        monkeypatch.setenv("GOOGLE_GENAI_USE_VERTEXAI", "true")
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "planted-project")
        monkeypatch.setenv("OPENAI_ORG_ID", "planted-org")
        monkeypatch.setenv("OPENAI_PROJECT_ID", "planted-project")
        monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "planted-token")
        monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "X-Planted: planted-header")
        monkeypatch.setenv("NO_PROXY", "")
        assert len(ask(server, tmp_path / "a.jsonl").store.ok) == 1
        assert len(server.requests) == 1 and not elsewhere.requests
        assert "planted" not in json.dumps(server.requests[0]).lower().replace(SECRET, "")


@pytest.mark.parametrize("agreed", hosts.REACHES)
@pytest.mark.parametrize("now", hosts.REACHES)
def test_a_host_that_leads_farther_away_than_was_agreed_to_is_asked_nothing_and_costs_nothing(
    agreed, now, tmp_path, monkeypatch
):
    monkeypatch.setattr(hosts, "reach", lambda host: agreed)
    egress.agree([parse_address("https://gpu-box/v1")])
    monkeypatch.setattr(hosts, "reach", lambda host: now)
    asked = session_with("https://gpu-box/v1", tmp_path)
    if hosts.REACHES.index(now) <= hosts.REACHES.index(agreed):
        assert run_async(lambda: asked.ask(QUESTION)) is None and asked.store.statuses.total() > 0
    else:
        with pytest.raises(egress.EgressRefused, match=rf"gpu-box \(parameter judge_endpoint\).* agreed to: {agreed}"):
            asked.run([lambda: asked.ask(QUESTION)])
        assert not asked.store.path.exists() and asked.budget.spent_usd == asked.budget.reserved_usd == 0.0


@pytest.mark.parametrize(("now", "refused"), [("machine", False), ("network", False), ("remote", True)])
def test_a_host_of_no_plan_must_lie_in_this_network_unless_its_answer_is_stored(now, refused, tmp_path, monkeypatch):
    egress.agree([])
    monkeypatch.setattr(hosts, "reach", lambda host: now)
    asked = session_with("https://gpu-box/v1", tmp_path)
    with pytest.raises(egress.EgressRefused) if refused else contextlib.nullcontext():
        run_async(lambda: asked.ask(QUESTION))
    asked.store.append([{"call_id": QUESTION.id, "status": "ok", "output": {}}])
    assert run_async(lambda: asked.ask(QUESTION)), "what is stored needs no host"


def test_a_notebook_run_by_hand_asks_no_host_beyond_this_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path))
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    notebook.open_run("01_glossary", params.declared("01_glossary"))
    asked = session_with("https://models.example.com/v1", tmp_path)
    with pytest.raises(egress.EgressRefused, match="A notebook run by hand asks only models of this network"):
        run_async(lambda: asked.ask(QUESTION))


# ---------------------------------------------------------------- the plan


def plan(monkeypatch, *models: HostedModel, root=None) -> str:
    """What the plan says about jobs with these models."""
    states = [
        SimpleNamespace(job=SimpleNamespace(id=f"judge-{i}/05_judge", model=m), decision="run")
        for i, m in enumerate(models)
    ]
    monkeypatch.setattr(schedule, "hosted_model", lambda job: job.model)
    console = Console(file=io.StringIO(), width=300)
    schedule.show_price(lambda job, model, *_: (f"calls at {model.host}", "answers"), console, root, [], states)
    return console.file.getvalue()


REMOTE = HostedModel("openai", "gpt-5.2", purpose="judge", parameter="judge_kind")
LOCAL = HostedModel("openai-compatible", "own", "http://127.0.0.1:9/v1")


def test_the_plan_says_which_variables_it_ignores_and_what_is_spent(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://evil.example")
    store = attempts.AttemptStore(tmp_path / "shared" / "store" / "conversations.jsonl")
    store.append([{"call_id": "a", "status": "ok", "usd": 1.5}])
    said = plan(monkeypatch, REMOTE, root=tmp_path)
    assert "OPENAI_BASE_URL, https_proxy of the environment does not count" in said and "$1.50" in said
    assert "proxy.example" not in said and "does not count" not in plan(monkeypatch, root=tmp_path)


def test_the_variables_that_the_plan_names_are_those_that_are_dropped_and_no_key_is_among_them(tmp_path, monkeypatch):
    before = set(os.environ)
    planted = {
        "HTTPS_PROXY", "all_proxy", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "ANTHROPIC_AUTH_TOKEN",
        "ANTHROPIC_CUSTOM_HEADERS", "GOOGLE_CLOUD_PROJECT", "GEMINI_ANYTHING",
    }  # fmt: skip
    for name in planted:
        monkeypatch.setenv(name, "x")
    said = plan(monkeypatch, LOCAL, root=tmp_path)
    assert f"these hosts: {', '.join(sorted(planted))} of the environment" in said
    ApiClient(LOCAL)
    assert set(os.environ) == before


def test_a_plan_on_a_store_with_bad_money_is_refused_by_file_and_line(tmp_path, monkeypatch):
    path = tmp_path / "shared" / "store" / "conversations.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"call_id": "a", "status": "ok", "usd": NaN}\n')
    with pytest.raises(ParameterError, match=r"conversations\.jsonl:1: usd is nan"):
        plan(monkeypatch, LOCAL, root=tmp_path)


def test_without_egress_a_plan_with_a_remote_host_is_refused_and_one_of_this_network_is_not(tmp_path, monkeypatch):
    egress.forbid()
    assert "127.0.0.1" in plan(monkeypatch, LOCAL, root=tmp_path)
    with pytest.raises(egress.EgressRefused, match=r"api\.openai\.com.*judge_kind"):
        plan(monkeypatch, LOCAL, REMOTE, root=tmp_path)


def test_without_egress_no_client_of_a_remote_host_can_be_made():
    egress.forbid()
    with pytest.raises(egress.EgressRefused):
        ApiClient(REMOTE)
    assert ApiClient(LOCAL) and os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_command_that_goes_on_forbids_egress_again():
    assert schedule.Options(no_egress=True).command().endswith("--no-egress")


@pytest.mark.parametrize(
    ("extra", "options", "code", "said"),
    [
        (
            "generator: google\ngenerator_model: m",
            ["--no-egress"], 4, ["generativelanguage.googleapis.com", "(parameter generator)"],
        ),
        (
            "generator: openai-compatible\ngenerator_model: m\ngenerator_endpoint: https://134744072/v1",
            ["--no-egress", "--dry-run"], 4, ["134744072", "generator_endpoint"],
        ),
        (
            "generator: openai-compatible\ngenerator_model: m\ngenerator_endpoint: http://0x08080808/v1",
            ["--dry-run"], 2, ["needs https", "generator_endpoint"],
        ),
        (
            "generator: openai-compatible\ngenerator_model: m\ngenerator_endpoint: http://127.0.0.1:99999/v1",
            ["--dry-run"], 2, ["port", "generator_endpoint"],
        ),
        (
            "generator: openai-compatible\ngenerator_model: m\ngenerator_endpoint: ftp://127.0.0.1/v1",
            ["--dry-run"], 2, ["http(s)", "generator_endpoint"],
        ),
    ],
)  # fmt: skip
def test_the_command_line_refuses_a_host_before_anything_runs(extra, options, code, said, tmp_path):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    with (tmp_path / "params" / "profiles" / "smoke.yaml").open("a") as stream:
        stream.write(f"\n{extra}\n")
    command = [sys.executable, "run_all.py", "--profile", "smoke", "--params", str(tmp_path / "params"), "--yes"]
    command += ["--outputs", str(tmp_path / "out"), "--steps", "01-02", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == code and all(text in done.stderr for text in said), done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "out").glob("*/*/*.ipynb"))


@pytest.mark.parametrize(
    "command", [["pilot", "--judge", "gpt-5-2"], ["batch", "submit"], ["batch", "poll"], ["batch", "collect"]]
)
def test_the_side_commands_that_call_hosts_can_be_forbidden_it(command, tmp_path, monkeypatch):
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path / "out"))
    shutil.copytree(ROOT / "params", tmp_path / "params")
    with (tmp_path / "params" / "profiles" / "smoke.yaml").open("a") as stream:
        stream.write("\ngenerator: google\ngenerator_model: gemini-2.5-flash\n")
    if command[0] == "pilot":
        judge = SimpleNamespace(judge=SimpleNamespace(hosted_model=REMOTE))
        monkeypatch.setattr("telco_nb.commands.pilot.open_study", lambda *_, **__: judge)
    words = [*command, "--profile", "smoke", "--params", str(tmp_path / "params"), "--yes", "--no-egress"]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 4 and "--no-egress" in ended.stderr and not list((tmp_path / "out").rglob("egress.jsonl"))
