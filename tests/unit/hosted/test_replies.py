"""Every reply ends in a status and a line, its reservation is settled, and no server holds or fills this machine."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import time
import tracemalloc
import zlib

import pytest
from hosted_fixtures import GOOD, MODELS, QUICK, Verdict, keys, lines  # noqa: F401
from provider_server import KINDS, Server, answer_body, error_body

from telco_nb.hosted import api, attempts, prices, transport
from telco_nb.hosted.api import ApiClient, HostedModel, ProviderError, Request
from telco_nb.hosted.session import CallsStopped, Session, run_async
from telco_nb.hosted.throttle import RetryPolicy

ONCE = RetryPolicy(limits={}, first_wait_s=0.01, longest_wait_s=0.05)
QUESTION = Request("q", "You compare two answers.", "Which is better?", Verdict)


def session(server: Server, path, **more) -> Session:
    client = ApiClient(HostedModel(server.kind, MODELS[server.kind], server.url, timeout_s=5.0, max_tokens=100))
    store = attempts.AttemptStore(path)
    price = prices.Prices(client.hosted_model, 1.0, 2.0)
    return Session(client, store, price, prices.Budget(1.0, store.spent_usd), **{"retry_policy": ONCE, **more})


def asked(kind: str, reply: object, path) -> tuple[Session, dict]:
    """A session after one request that got this reply, and the line that it left."""
    with Server(kind, lambda body, n: reply) as server:
        asking = session(server, path)
        asking.run([lambda: asking.ask(QUESTION)])
    (line,) = lines(path)
    return asking, line


def good_body(kind: str, **more) -> dict:
    return answer_body(kind, MODELS[kind], GOOD) | more


def gzipped(kind: str) -> bytes:
    return gzip.compress(json.dumps(good_body(kind)).encode())


DEEP = b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
ODD = {
    "no choices": lambda kind: (200, {}, good_body(kind, choices=[], content=[], candidates=[])),
    "null": lambda kind: (200, {}, b"null"),
    "null parts": lambda kind: (200, {}, good_body(kind, choices=None, content=None, candidates=None)),
    "numbers": lambda kind: (200, {}, good_body(kind, choices=[7], content=[7], candidates=[7])),
    "a list": lambda kind: (200, {}, b"[]"),
    "a text": lambda kind: (200, {}, b'"no"'),
    "an empty object": lambda kind: (200, {}, b"{}"),
    "nothing": lambda kind: (200, {}, b""),
    "deep": lambda kind: (200, {}, DEEP),
    "a deep error": lambda kind: (400, {}, b'{"error": ' + b"[" * 900 + b"]" * 900 + b"}"),
    "no text": lambda kind: (200, {"Content-Type": "text/html; charset=no-such"}, b"\xff\xfe\x00"),
    "bad gzip": lambda kind: (200, {"Content-Encoding": "gzip"}, b"this is no gzip"),
    "cut gzip": lambda kind: (200, {"Content-Encoding": "gzip"}, gzipped(kind)[:-20]),
    "unknown coding": lambda kind: (200, {"Content-Encoding": "br"}, b"\x0b\x02\x80"),
    "usage of text": lambda kind: (200, {}, good_body(kind, usage="many", usageMetadata="many")),
    "a number as usage": lambda kind: (200, {}, good_body(kind, usage=7, usageMetadata=7)),
    "a redirect": lambda kind: (302, {"Location": "https://evil.example/v1"}, b""),
    "a continue": lambda kind: (204, {}, b""),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_reply_ends_in_a_status_and_one_line_and_its_reservation_is_settled(odd, kind, tmp_path):
    asking, line = asked(kind, ODD[odd](kind), tmp_path / "a.jsonl")
    assert line["status"] in api.STATUSES and line["error"] is not None
    assert asking.budget.reserved_usd == pytest.approx(0.0, abs=1e-12)
    assert asking.budget.spent_usd == pytest.approx(attempts.cost_usd(line))


LOST = ("null", "nothing", "deep", "bad gzip", "cut gzip", "unknown coding")


@pytest.mark.parametrize("odd", LOST)
def test_a_reply_of_status_200_that_cannot_be_read_counts_at_its_worst_case(odd, tmp_path):
    asking, line = asked("openai", ODD[odd]("openai"), tmp_path / "a.jsonl")
    assert line["status"] == "provider_error" and line["usd"] is None
    assert line["usd_at_most"] == pytest.approx(asking.prices.worst_case(QUESTION))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_reply_that_is_compressed_unasked_is_read(kind, pack, tmp_path):
    coding = "gzip" if pack is gzip.compress else "deflate"
    packed = pack(json.dumps(good_body(kind)).encode())
    _, line = asked(kind, (200, {"Content-Encoding": coding}, packed), tmp_path / "a.jsonl")
    assert line["status"] == "ok"


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -(10**9), "completion_tokens": 20, "total_tokens": 0},
        {"prompt_tokens": 100, "completion_tokens": -(10**9), "total_tokens": 0},
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        None,
    ],
)
def test_a_server_that_reports_no_or_negative_tokens_lowers_no_sum_and_counts_at_its_worst_case(usage, tmp_path):
    asking, line = asked(
        "openai-compatible", (200, {}, good_body("openai-compatible", usage=usage)), tmp_path / "a.jsonl"
    )
    worst = asking.prices.worst_case(QUESTION)
    assert attempts.cost_usd(line) == asking.budget.spent_usd == pytest.approx(worst)
    assert attempts.AttemptStore(tmp_path / "a.jsonl").spent_usd == pytest.approx(worst)


# ---------------------------------------------------------------- sizes


def endless():
    return itertools.repeat(b'{"x": "' + b"x" * 2**20)


BOMB = gzip.compress(b" " * 300 * 2**20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["endless", "bomb", "endless error"])
def test_a_reply_without_end_is_given_up_at_8_megabytes(name, kind, tmp_path):
    replies = {
        "endless": lambda: (200, {}, endless()),
        "bomb": lambda: (200, {"Content-Encoding": "gzip"}, BOMB),
        "endless error": lambda: (500, {}, endless()),
    }
    tracemalloc.start()
    asking, line = asked(kind, replies[name](), tmp_path / "a.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert line["status"] == "provider_error" and "8,388,608 bytes" in line["error"]
    assert line["usd_at_most"] > 0 and asking.budget.reserved_usd == pytest.approx(0.0, abs=1e-12)
    assert peak < 8 * transport.LIVE_BYTES


def test_a_reply_just_below_the_limit_is_read(tmp_path):
    body = json.dumps(good_body("openai")).encode()
    body += b" " * (transport.LIVE_BYTES - len(body))
    assert asked("openai", (200, {}, body), tmp_path / "a.jsonl")[1]["status"] == "ok"


def test_a_reply_that_trickles_ends_at_the_deadline(tmp_path):
    def trickle():
        while True:
            yield b" "
            time.sleep(0.05)

    with Server("openai", lambda body, n: (200, {}, trickle())) as server:
        asking = session(server, tmp_path / "a.jsonl")
        asking.client.settings = lambda live=True: ApiClient.settings(asking.client, live) | {"request_timeout": 0.5}
        began = time.monotonic()
        asking.run([lambda: asking.ask(QUESTION)])
    assert time.monotonic() - began < 5 and lines(tmp_path / "a.jsonl")[0]["status"] == "timeout"


# ---------------------------------------------------------------- pauses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [429, 503])
def test_a_pause_of_years_ends_the_run_as_rate_limited_and_says_how_long_it_was(kind, status, tmp_path):
    reply = (status, {"Retry-After": "99999999"}, error_body(kind, status))
    with Server(kind, lambda body, n: reply) as server:
        asking = session(server, tmp_path / "a.jsonl", retry_policy=QUICK, max_in_flight=4)
        began = time.monotonic()
        with pytest.raises(CallsStopped, match=r"pause of 99,999,999 s; at most 300 s") as stopped:
            asking.run([lambda i=i: asking.ask(Request(f"q{i}", "", "?", Verdict)) for i in range(20)])
    assert stopped.value.status == "rate_limited" and time.monotonic() - began < 10
    assert {line["status"] for line in lines(tmp_path / "a.jsonl")} == {"rate_limited"}
    assert asking.budget.reserved_usd == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("header", ["-5", "nan", "inf", "soon", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_no_pause_that_a_server_asks_for_is_longer_than_the_limit(header):
    async def ask() -> api.Response:
        with Server("openai", lambda body, n: (429, {"Retry-After": header}, error_body("openai", 429))) as server:
            client = ApiClient(HostedModel("openai", "gpt-5.2", server.url, timeout_s=5.0))
            response = await client.ask(QUESTION)
            await client.close()
            return response

    response = run_async(ask)
    assert response.status == "rate_limited" and (response.retry_after or 0.0) <= api.LONGEST_PAUSE_S


# ---------------------------------------------------------------- without a reply


@pytest.mark.parametrize(
    ("error", "spent"), [(ProviderError("refused"), False), (asyncio.CancelledError(), True), (SystemExit(), True)]
)
def test_a_request_that_ends_in_no_response_is_settled_too(error, spent, tmp_path):
    with Server("openai", lambda body, n: GOOD) as server:
        asking = session(server, tmp_path / "a.jsonl")

        async def fail(*_):
            raise error

        asking.client.ask = fail

        async def work() -> None:
            with pytest.raises(type(error)):
                await asking.ask(QUESTION)

        run_async(work)
    assert asking.budget.reserved_usd == 0.0 and (asking.budget.spent_usd > 0) == spent
