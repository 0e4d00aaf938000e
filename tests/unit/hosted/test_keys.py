"""No piece of a key, and no control character of a server, reaches a file, a log or a terminal."""

from __future__ import annotations

import json
import logging
import traceback
from functools import partial

import pytest
from hosted_fixtures import GOOD, MODELS, QUICK, Verdict
from provider_server import KINDS, Server, answer_body

from telco_nb.hosted import attempts, keys, prices
from telco_nb.hosted.api import ApiClient, HostedModel, ProviderError, Request
from telco_nb.hosted.session import CallsStopped, Session, run_async
from telco_nb.hosted.throttle import RetryPolicy

CANARY = "sk-CaNaRy-7f3Kq9Zw2LxT8vRb5NmJ4hGd"
OTHER = "AIza0tH3r9Qx7Lm2Vn5Rk8Wz1Bc4"


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    """The canary is the key of every provider but Gemini's second variable, which holds another."""
    for names in keys.KEY_VARIABLES.values():
        monkeypatch.setenv(names[0], CANARY)
    monkeypatch.setenv("GEMINI_API_KEY", OTHER)


def pieces(text: str, key: str = CANARY) -> list[str]:
    """The pieces of a key, 8 characters long, in a text."""
    low = key.lower()
    return [low[i : i + 8] for i in range(len(low) - 7) if low[i : i + 8] in text.lower()]


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("start", range(0, len(CANARY) - 7))
def test_every_piece_of_8_characters_is_hidden_wherever_it_stands(start):
    piece = CANARY[start : start + 8]
    for text in (piece, f"({piece})", f"x{piece}y", piece.upper(), f"a {piece} b {CANARY} c"):
        assert not pieces(keys.redact(text)) and "[key]" in keys.redact(text)


def test_a_whole_key_becomes_one_mark_and_the_rest_stays():
    assert keys.redact(f"key {CANARY}, or {OTHER}!") == "key [key], or [key]!"
    assert keys.redact(CANARY[:7]) == CANARY[:7] and keys.redact("no key at all") == "no key at all"


@pytest.mark.parametrize("before", range(470, 510))
def test_a_key_is_hidden_before_its_text_is_cut(before):
    said = keys.safe("x" * before + CANARY + "y" * 100)
    assert len(said) <= 500 and not pieces(said) and "sk-" not in said.lower()


@pytest.mark.parametrize("between", ["\x00", "\x1b[0m", "\u200b", "\n", "\t", "\x1b]8;;\x07"])
def test_a_key_around_a_control_character_is_not_put_together_again(between):
    assert not pieces(keys.safe(CANARY[:12] + between + CANARY[12:]))


HOSTILE = "\x1b[2J\x1b]0;owned\x07\x1b]8;;https://evil.example\x1b\\click\x9b31m\u202eevil\r\b\x7f\u2066"


def test_what_could_steer_a_terminal_is_made_printable():
    said = keys.safe(HOSTILE)
    assert said.isprintable() and "click" in said and "\ufffd" in said
    assert keys.safe("línea ✓ 你好") == "línea ✓ 你好"


def test_an_error_without_a_text_still_has_one():
    class Silent(Exception):
        def __str__(self) -> str:
            raise RecursionError

    assert "Silent" in keys.safe(Silent())


@pytest.mark.parametrize("key", ["sk with space", "sk-\x1b[0m", "sk-ключ"])
def test_a_key_that_is_none_is_refused_without_being_repeated(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ProviderError, match="OPENAI_API_KEY") as refused:
        ApiClient(HostedModel("openai", "gpt-5.2"))
    assert key not in str(refused.value)


# ---------------------------------------------------------------- everything that a run leaves behind


def error_with(kind: str, text: str, status: int) -> dict:
    """An error body of a provider whose message, code and type say this."""
    if kind == "google":
        return {"error": {"code": status, "message": text, "status": text, "details": [{"reason": text}]}}
    return {"type": "error", "error": {"message": text, "type": text, "code": text}}


def echoes(kind: str) -> list:
    """Replies that say the key, whole and in pieces, wherever a reply can say something."""
    texts = ["x" * n + CANARY + HOSTILE for n in (0, 380, 440, 470, 480, 485, 490, 495, 499)]
    texts += [CANARY[4:15] + "\x1b[0m" + CANARY[15:], f"Incorrect key: {CANARY.upper()}", OTHER + HOSTILE]
    replies: list = [(status, {}, error_with(kind, text, status)) for text in texts for status in (400, 500, 503)]
    replies += [(500, {"X-Request-Id": CANARY}, CANARY.encode()), (200, {}, f"<html>{CANARY}".encode())]
    said = [CANARY, GOOD + CANARY, json.dumps({"verdict": CANARY, "margin": 1}), json.dumps({CANARY + HOSTILE: 1})]
    bodies = [answer_body(kind, CANARY + HOSTILE, text) for text in said] + [
        answer_body(kind, "m", None, refusal=CANARY) | {"id": CANARY + HOSTILE, "responseId": CANARY},
        answer_body(kind, "m", GOOD, finish="length"),
    ]
    return replies + [(200, {}, body) for body in bodies]


PATIENT = RetryPolicy(first_wait_s=0.01, longest_wait_s=0.05, failures_in_a_row=1000)
LAST = [401, 404, 402]  # each ends a run with a message that reaches the terminal


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_a_server_repeats_is_in_no_file_no_log_and_no_message_of_a_run(kind, tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    said: list[str] = []
    replies = echoes(kind)
    for run, status in enumerate(LAST):
        script = [*replies, (status, {}, error_with(kind, "x" * 480 + CANARY + HOSTILE, status))]
        with Server(kind, lambda body, n, script=script: script[min(n, len(script)) - 1]) as server:
            client = ApiClient(HostedModel(kind, MODELS[kind], server.url, timeout_s=5.0))
            store = attempts.AttemptStore(tmp_path / "study" / f"run-{run}" / "store" / "a.jsonl")
            price = prices.Prices(client.hosted_model, 1.0, 1.0)
            asking = Session(client, store, price, prices.Budget(1.0), max_in_flight=1, retry_policy=PATIENT)
            questions = [Request(f"q{i}", "s", "?", Verdict) for i in range(60)]
            with pytest.raises(CallsStopped) as stopped:
                asking.run([partial(asking.ask, question) for question in questions])
            said += ["".join(traceback.format_exception(stopped.value)), str(stopped.value)]
        assert len(server.requests) >= len(script) and store.statuses.total() >= len(script)
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.name for p in written} == {"a.jsonl", "egress.jsonl"} and len(said) == 2 * len(LAST)
    said += [p.read_text() for p in written] + [caplog.text, *capfd.readouterr()]
    errors = [line["error"] or "" for p in written if p.name == "a.jsonl" for line in map(json.loads, p.open())]
    assert any("[key]" in error for error in errors) and all(error.isprintable() for error in errors)
    for key in (CANARY, OTHER):
        assert [pieces(text, key) for text in said if pieces(text, key)] == []
    assert all(text.isprintable() for text in said[1 : 2 * len(LAST) : 2])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_answers_is_stored_without_the_key_it_repeats(kind, tmp_path):
    class Reply(Verdict):
        analysis: str

    answer = json.dumps({"verdict": "A", "margin": 1, "analysis": f"Your key is {CANARY}."})
    with Server(kind, lambda body, n: (200, {}, answer_body(kind, "m", answer))) as server:
        client = ApiClient(HostedModel(kind, MODELS[kind], server.url, timeout_s=5.0))
        store = attempts.AttemptStore(tmp_path / "a.jsonl")
        asking = Session(client, store, prices.Prices(client.hosted_model), prices.Budget(None), retry_policy=QUICK)
        asking.run([lambda: asking.ask(Request("q", "s", "?", Reply))])
    assert store.ok["q"]["output"]["analysis"] == "Your key is [key]." and not pieces(store.path.read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["none", "EMPTY", "verdict", "fifteen-letters"])
def test_a_word_that_stands_for_a_key_stays_in_what_a_model_says(word, kind, monkeypatch):
    monkeypatch.setenv(keys.KEY_VARIABLES[kind][0], word)
    answer = json.dumps({"verdict": "A", "margin": 1, "analysis": f"{word} of them, {CANARY[:12]}"})

    class Reply(Verdict):
        analysis: str

    with Server(kind, lambda body, n: (200, {}, answer_body(kind, f"model-{word}", answer))) as server:
        client = ApiClient(HostedModel(kind, MODELS[kind], server.url, timeout_s=5.0))
        response = run_async(lambda: client.ask(Request("q", "s", "?", Reply)))
    assert (response.status, response.raw) == ("ok", answer)
    assert response.output.analysis == f"{word} of them, {CANARY[:12]}", "a piece of a key is no key either"


def test_the_original_reply_is_parsed_and_a_key_in_any_case_is_hidden_afterwards(monkeypatch):
    monkeypatch.setenv("OPENAI_COMPATIBLE_API_KEY", '"verdict":"A"   ')
    monkeypatch.setenv("OPENAI_API_KEY", "sixteen-letters!")
    assert keys.redact_whole("say SIXTEEN-letters! and sixteen-letters") == "say [key] and sixteen-letters"
    with Server("openai-compatible", lambda body, n: GOOD) as server:
        client = ApiClient(HostedModel("openai", "gpt-5.2", server.url, timeout_s=5.0))
        response = run_async(lambda: client.ask(Request("q", "s", "?", Verdict)))
    assert response.output == Verdict(verdict="A", margin=1)


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_variable_holds_no_key(blank, monkeypatch):
    monkeypatch.setenv("GOOGLE_API_KEY", blank)
    monkeypatch.setenv("OPENAI_API_KEY", blank)
    assert HostedModel("google", "gemini-2.5-flash").key() == OTHER
    with pytest.raises(ProviderError, match=r"no key for gpt-5\.2\. Set the environment variable OPENAI_API_KEY"):
        HostedModel("openai", "gpt-5.2").key()


def test_an_error_of_the_parameters_names_no_key(monkeypatch):
    from pydantic_ai.exceptions import UserError

    error = UserError(f"bad setting {CANARY}")

    async def refuse(*_, **__):
        raise error

    monkeypatch.setattr("pydantic_ai.direct.model_request", refuse)
    client = ApiClient(HostedModel("openai", "gpt-5.2", "http://127.0.0.1:9/v1"))
    with pytest.raises(ProviderError, match=r"bad setting \[key\]") as refused:
        run_async(lambda: client.ask(Request("q", "s", "?", Verdict)))
    assert not pieces("".join(traceback.format_exception(refused.value)))
