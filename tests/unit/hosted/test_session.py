"""Calls to hosted models: every fault has a name, nothing is lost, doubled or paid twice, and limits hold."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hosted_fixtures import GOOD, MODELS, QUICK, SECRET, STOPS, Verdict, keys, lines  # noqa: F401
from provider_server import FAULTS, KINDS, Server

from telco_nb.hosted import api, attempts, prices
from telco_nb.hosted.api import ApiClient, HostedModel, ProviderError, Request
from telco_nb.hosted.session import CallsStopped, Session, run_async


def question(i: int = 0) -> Request:
    return Request(f"q{i}", "You compare two answers.", f"Which is better? ({i})", Verdict)


def hosted_model(kind: str, url: str, **more) -> HostedModel:
    return HostedModel(kind, MODELS[kind], url, **{"timeout_s": 5.0, "max_tokens": 100, **more})


def session(server: Server, path: Path, *, budget: float | None = None, **more) -> Session:
    client = ApiClient(hosted_model(server.kind, server.url, **more.pop("hosted_model", {})))
    more.setdefault("retry_policy", QUICK)
    store = attempts.AttemptStore(path)
    price = prices.Prices(client.hosted_model, *more.pop("declared", (None, None)))
    return Session(client, store, price, prices.Budget(budget, store.spent_usd), **more)


def ask_all(server: Server, path: Path, n: int, **more) -> Session:
    asking = session(server, path, **more)
    asking.run([lambda i=i: asking.ask(question(i)) for i in range(n)])
    return asking


# ---------------------------------------------------------------- one request


EXPECTED = {
    "429": "rate_limited", "429-after": "rate_limited", "500": "provider_error", "529": "provider_error",
    "slow": "timeout", "cut": "provider_error", "not-json": "provider_error", "half-json": "parse_error",
    "refusal": "refusal", "filter": "content_filter", "length": "truncated", "empty": "parse_error",
    "wrong-schema": "parse_error", "401": "provider_error", "404": "model_retired", "quota": "provider_error",
}  # fmt: skip
# Anthropic knows one stop reason for both, and so does Google, whose refusals are filters.
SPECIAL = {("anthropic", "filter"): "refusal", ("google", "refusal"): "content_filter"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_of_every_provider_ends_in_its_status_after_one_request(kind):
    assert set(EXPECTED) == set(FAULTS)

    async def ask(fault: str):
        with Server(kind, lambda body, n: fault, good=GOOD, slow_s=1.0) as server:
            client = ApiClient(hosted_model(kind, server.url, timeout_s=0.5 if fault == "slow" else 5.0))
            response = await client.ask(question())
            await client.close()
            return response, len(server.requests)

    for fault, status in EXPECTED.items():
        response, n_requests = run_async(lambda fault=fault: ask(fault))
        assert (fault, response.status) == (fault, SPECIAL.get((kind, fault), status))
        assert (fault, n_requests) == (fault, 1)  # the SDKs' own retries are off
        assert (fault, response.stop) == (fault, fault in STOPS)
        assert response.output is None and response.error and SECRET not in response.error
        assert (response.retry_after == 1.0) == (fault == "429-after")


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_answer_comes_with_its_receipt_and_what_was_sent(kind):
    async def ask():
        with Server(kind, lambda body, n: GOOD) as server:
            client = ApiClient(hosted_model(kind, server.url, temperature=0.5))
            response = await client.ask(question())
            await client.close()
            return response, server.requests[0]

    response, request = run_async(ask)
    receipt = response.receipt
    assert response.output == Verdict(verdict="A", margin=1)
    assert receipt["model_returned"].startswith(MODELS[kind] if kind != "google" else "gemini")
    assert receipt["request_id"] and receipt["finish_reason"] in ("stop", "end_turn", "STOP")
    assert (receipt["tokens_in"], receipt["tokens_out"]) == (140 if kind == "anthropic" else 100, 20)
    sent = json.dumps(receipt["parameters_sent"])
    assert "Which is better" not in sent and SECRET not in sent
    assert "margin" in json.dumps(request)  # the schema went along, by the provider's own means
    assert ("temperature" in json.dumps(request)) and ("temperature" in sent)


def test_a_parameter_that_the_model_does_not_take_is_not_on_record_as_sent():
    async def ask():
        with Server("openai", lambda body, n: GOOD) as server:
            client = ApiClient(HostedModel("openai", "gpt-5", server.url, temperature=0.5))
            response = await client.ask(question())
            await client.close()
            return response, server.requests[0]

    response, request = run_async(ask)
    assert response.status == "ok" and "temperature" not in request
    assert "temperature" not in response.receipt["parameters_sent"]


def test_a_prompted_schema_goes_into_the_prompt_for_servers_that_refuse_a_response_format():
    async def ask():
        with Server("openai-compatible", lambda body, n: f"```json\n{GOOD}\n```") as server:
            client = ApiClient(hosted_model(server.kind, server.url, structured="prompted"))
            response = await client.ask(question())
            await client.close()
            return response, server.requests[0]

    response, request = run_async(ask)
    assert response.status == "ok" and "response_format" not in request
    assert '"margin"' in request["messages"][0]["content"]


@pytest.mark.parametrize(("model", "characters", "marked"), [
    ("claude-sonnet-4-5", 4 * 1024, True), ("claude-sonnet-4-5", 4 * 1024 - 1, False),
    ("claude-haiku-4-5", 4 * 2048 - 1, False), ("claude-haiku-4-5", 4 * 2048, True),
])  # fmt: skip
def test_a_beginning_is_marked_for_the_cache_only_if_it_is_long_enough_to_be_cached(model, characters, marked):
    async def ask():
        with Server("anthropic", lambda body, n: GOOD) as server:
            asking = ApiClient(HostedModel("anthropic", model, server.url))
            shared = "x" * (characters - len("You compare."))
            await asking.ask(Request("q", "You compare.", "Which is better?", Verdict, shared=shared))
            await asking.close()
            return server.requests[0]

    said = run_async(ask)["messages"][0]["content"]
    texts = [part["text"] for part in said] if isinstance(said, list) else [said]
    assert "".join(texts).endswith("xWhich is better?") and ('"cache_control"' in json.dumps(said)) == marked


def test_a_long_system_text_without_a_shared_beginning_is_sent_to_anthropic_as_the_generator_sends_it():
    async def ask():
        with Server("anthropic", lambda body, n: GOOD) as server:
            asking = ApiClient(hosted_model("anthropic", server.url))
            response = await asking.ask(Request("q", "You write chats. " * 1000, "Write one.", Verdict))
            await asking.close()
            return response, server.requests[0]

    response, sent = run_async(ask)
    assert response.status == "ok" and "Write one." in json.dumps(sent["messages"])
    assert "cache_control" in json.dumps(sent["system"]), "the four requests of a scenario share it"


@pytest.mark.parametrize(
    "raw",
    ["", "   ", "null", "[]", '{"verdict":"A"}', '{"verdict":"C","margin":1}', '{"verdict":"A","margin":"1"}',
     f"Sure! {GOOD}", f"{GOOD} {GOOD}", f"{GOOD}\nIgnore that.", f"```json\n{GOOD}\n```\n{GOOD}", "\x00", "\ud800"],
)  # fmt: skip
def test_only_a_whole_valid_object_is_read(raw):
    output, wrong = api.parse(raw, Verdict)
    assert output is None and wrong


def test_a_model_whose_endpoint_could_leak_a_secret_or_go_astray_is_refused():
    for endpoint in ("http://user:pass@127.0.0.1/v1", "https://host.example/v1?key=1", "ftp://127.0.0.1", "nonsense"):
        with pytest.raises(ProviderError):
            HostedModel("openai-compatible", "m", endpoint)
    with pytest.raises(ProviderError, match="https"):
        HostedModel("openai-compatible", "m", "http://models.example.com/v1")
    with pytest.raises(ProviderError, match="no endpoint"):
        HostedModel("openai-compatible", "m")
    assert HostedModel("openai-compatible", "m", "http://10.1.2.3:8000/v1").is_local
    assert not HostedModel("anthropic", "m").is_local


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with pytest.raises(ProviderError, match="ANTHROPIC_API_KEY"):
        ApiClient(HostedModel("anthropic", "claude-sonnet-4-5"))


# ---------------------------------------------------------------- many requests


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_through_all_passing_faults_loses_and_doubles_nothing(kind, tmp_path):
    passing = [f for f in FAULTS if f not in STOPS and f not in ("refusal", "filter", "slow")]
    asked: Counter[str] = Counter()
    lock = threading.Lock()

    def script(body: dict, n: int) -> str:
        text = json.dumps(body)
        name = text[text.index("better? (") :].split(")")[0]
        with lock:
            asked[name] += 1
            first = asked[name] == 1
        return passing[int(name.split("(")[1]) % len(passing)] if first else GOOD

    with Server(kind, script, good=GOOD) as server:
        done = ask_all(server, tmp_path / "attempts.jsonl", 2 * len(passing), max_in_flight=8)
        n_requests = len(server.requests)
    stored = lines(tmp_path / "attempts.jsonl")
    good = Counter(line["call_id"] for line in stored if line["status"] == "ok")
    assert good == Counter({f"q{i}": 1 for i in range(2 * len(passing))})
    assert len(stored) == n_requests == 4 * len(passing)  # each failed once, each attempt is a line
    assert SECRET not in (tmp_path / "attempts.jsonl").read_text()
    assert done.store.statuses["parse_error"] == 6 and done.store.statuses["rate_limited"] == 4


def test_an_unreadable_answer_is_asked_for_again_with_what_was_wrong_three_times_at_most(tmp_path):
    with Server("openai", lambda body, n: "wrong-schema") as server:
        asking = ask_all(server, tmp_path / "a.jsonl", 1)
        last = server.requests[-1]["messages"]
    assert asking.store.attempts["q0"] == 3 and not asking.store.ok
    assert [m["role"] for m in last] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "verdict: Field required" in last[-1]["content"]


def test_what_is_refused_is_asked_once_and_never_becomes_a_number(tmp_path):
    with Server("openai", lambda body, n: "refusal") as server:
        asking = ask_all(server, tmp_path / "a.jsonl", 3)
    assert asking.store.statuses == {"refusal": 3} and not asking.store.ok
    assert all(line["output"] is None for line in lines(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(("fault", "status"), [("404", "model_retired"), ("401", "provider_error")])
def test_a_retired_model_or_a_wrong_key_stops_the_run_at_once_and_says_what_to_set(fault, status, tmp_path):
    with Server("google", lambda body, n: fault) as server:
        with pytest.raises(CallsStopped, match=r"model id|GOOGLE_API_KEY") as stopped:
            ask_all(server, tmp_path / "a.jsonl", 200, max_in_flight=4)
        assert len(server.requests) <= 4
    assert stopped.value.status == status


def test_a_server_that_only_fails_stops_the_run(tmp_path):
    with Server("openai", lambda body, n: "500") as server, pytest.raises(CallsStopped, match="requests to"):
        ask_all(server, tmp_path / "a.jsonl", 100)


def test_resuming_asks_only_what_has_no_good_answer(tmp_path):
    with Server("anthropic", lambda body, n: GOOD if n % 2 else "refusal") as server:
        ask_all(server, tmp_path / "a.jsonl", 20, max_in_flight=1)
    with Server("anthropic", lambda body, n: GOOD) as server:
        asking = ask_all(server, tmp_path / "a.jsonl", 20)
        assert len(server.requests) == 10
    assert len(asking.store.ok) == 20
    with Server("anthropic", lambda body, n: GOOD) as server:
        ask_all(server, tmp_path / "a.jsonl", 20)
        assert not server.requests


def test_a_torn_last_line_is_skipped_and_a_whole_one_without_its_line_feed_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    with Server("openai", lambda body, n: GOOD) as server:
        ask_all(server, path, 4)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    store = attempts.AttemptStore(path)
    assert (len(store.ok), store.unreadable) == (3, 1)
    path.write_bytes(whole[:-1])
    assert len(attempts.AttemptStore(path).ok) == 4


# ---------------------------------------------------------------- limits of the provider and of the purse


class Limited:
    """Lets `per_minute` requests through, with `answer(body, number)`. `bucket`: a token bucket of that many; None: a
    fixed window of `window_s`. `good`: when each was let through."""

    def __init__(
        self,
        per_minute: float,
        retry_after: bool,
        bucket: float | None = None,
        window_s: float = 3.0,
        answer: Callable[[dict, int], str] = lambda body, n: GOOD,
    ):
        self.answer = answer
        self.rate, self.retry_after, self.bucket, self.window_s = per_minute / 60, retry_after, bucket, window_s
        self.tokens, self.last, self.start = bucket or self.rate * window_s, time.monotonic(), time.monotonic()
        self.good: list[float] = []
        self.lock = threading.Lock()

    def __call__(self, body: dict, n: int):
        with self.lock:
            now = time.monotonic()
            if self.bucket:
                self.tokens = min(self.bucket, self.tokens + (now - self.last) * self.rate)
                wait = (1 - self.tokens) / self.rate
            elif now - self.start >= self.window_s:
                self.start, self.tokens = now, self.rate * self.window_s
            if not self.bucket:
                wait = self.start + self.window_s - now
            self.last = now
            if self.tokens >= 1:
                self.tokens -= 1
                self.good.append(now)
                return self.answer(body, n)
            return 429, {"retry-after-ms": str(round(1000 * wait))} if self.retry_after else {}, {"error": {}}

    def used(self) -> float:
        """Share of the rate that was used after the first burst, which may go out at once and says nothing."""
        later = self.good[int(self.bucket or self.rate * self.window_s) :]
        return (len(later) - 1) / (later[-1] - later[0]) / self.rate


@pytest.mark.parametrize(("retry_after", "bucket"), [(True, None), (False, 6.0)])
def test_a_rate_limited_server_is_used_to_nine_tenths_of_its_limit_and_no_item_is_lost_or_doubled(
    retry_after, bucket, tmp_path
):
    limit = Limited(360, retry_after, bucket)
    with Server("openai-compatible", limit) as server:
        asking = ask_all(server, tmp_path / "a.jsonl", 70)
    assert Counter(line["call_id"] for line in lines(tmp_path / "a.jsonl") if line["status"] == "ok") == Counter(
        {f"q{i}": 1 for i in range(70)}
    )
    assert len(limit.good) == 70 == len(asking.store.ok)
    assert limit.used() >= 0.9


def test_a_budget_is_never_overdrawn_and_what_was_paid_counts_on_resume(tmp_path):
    path = tmp_path / "a.jsonl"
    with Server("openai", lambda body, n: GOOD) as server:
        one = session(server, tmp_path / "x.jsonl")
        worst, price = one.prices.worst_case(question()), one.prices.of_tokens(100, 20)
        cap = worst + 10.5 * price
        with pytest.raises(CallsStopped, match="Raise --max-usd") as stopped:
            ask_all(server, path, 100, budget=cap, max_in_flight=1)
        assert stopped.value.status == "budget_stop"
        paid = len(server.requests)
        spent = attempts.AttemptStore(path).spent_usd
        assert paid == 11 and spent == pytest.approx(11 * price) and spent <= cap
        with pytest.raises(CallsStopped):
            ask_all(server, path, 100, budget=cap, max_in_flight=8)
        assert len(server.requests) == paid
        ask_all(server, path, 15, budget=1.0)
        assert len(server.requests) == 15
    assert lines(path)[11]["status"] == "budget_stop"


def test_many_in_flight_do_not_overdraw_together(tmp_path):
    with Server("openai", lambda body, n: GOOD) as server:
        worst = session(server, tmp_path / "x.jsonl").prices.worst_case(question())
        with pytest.raises(CallsStopped):
            ask_all(server, tmp_path / "a.jsonl", 300, budget=3 * worst, max_in_flight=16)
    assert attempts.AttemptStore(tmp_path / "a.jsonl").spent_usd <= 3 * worst


def test_under_a_cap_a_model_without_a_price_is_refused_and_a_declared_price_counts(tmp_path):
    with Server("openai-compatible", lambda body, n: GOOD) as server:
        with pytest.raises(CallsStopped, match="input_usd_per_mtok"):
            ask_all(server, tmp_path / "a.jsonl", 3, budget=1.0)
        assert not server.requests
        asking = ask_all(server, tmp_path / "a.jsonl", 3, budget=1.0, declared=(1.0, 2.0))
    assert asking.store.spent_usd == pytest.approx(3 * (100 * 1.0 + 20 * 2.0) / 1e6)


def test_a_lost_answer_is_booked_at_its_worst_case(tmp_path):
    with Server("openai", lambda body, n: "cut" if n == 1 else GOOD) as server:
        asking = ask_all(server, tmp_path / "a.jsonl", 1, budget=1.0)
    lost, good = lines(tmp_path / "a.jsonl")
    assert lost["usd"] is None and lost["usd_at_most"] == asking.prices.worst_case(question())
    assert asking.store.spent_usd == pytest.approx(lost["usd_at_most"] + good["usd"])


def test_prices_are_those_of_an_independent_table():
    usage = pytest.importorskip("genai_prices").Usage(input_tokens=1_000_000, output_tokens=100_000)
    assert prices.Prices(HostedModel("anthropic", "claude-sonnet-4-5")).usd(usage) == pytest.approx(
        6.0 + 2.25
    )  # >200k tier
    assert prices.Prices(HostedModel("openai", "gpt-5.2")).usd(usage) == pytest.approx(1.75 + 1.4)
    assert prices.Prices(HostedModel("openai", "gpt-5.2"), factor=0.5).usd(usage) == pytest.approx(1.575)
    assert prices.Prices(HostedModel("openai", "no-such-model")).usd(usage) is None
