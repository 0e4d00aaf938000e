"""A real HTTP server on loopback that speaks the providers' wire formats, and fails in every way that they do."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# For children that are killed: the server that forks them is one for the whole test run, and imports this once.
PRELOAD = [
    "test_llm_writer",
    "test_language_model",
    "pydantic_ai.models.openai",
    "pydantic_ai.providers.openai_compatible",
]
KINDS = ("anthropic", "openai", "google", "openai-compatible")
FAULTS = (
    "429", "429-after", "500", "529", "slow", "cut", "not-json", "half-json", "refusal", "filter", "length", "empty",
    "wrong-schema", "401", "404", "quota",
)  # fmt: skip


def answer_body(kind: str, model: str, text: str | None, finish: str = "stop", refusal: str | None = None) -> dict:
    """A provider's reply. `finish` is stop, length or filter."""
    if kind == "anthropic":
        reason = {"stop": "end_turn", "length": "max_tokens", "filter": "refusal"}[finish if not refusal else "filter"]
        content = [] if text is None else [{"type": "text", "text": text}]
        usage = {"input_tokens": 100, "output_tokens": 20, "cache_read_input_tokens": 40}
        return {
            "id": "msg_1", "type": "message", "role": "assistant", "model": f"{model}-20250929", "content": content,
            "stop_reason": reason, "stop_sequence": None, "usage": usage,
        }  # fmt: skip
    if kind == "google":
        reason = {"stop": "STOP", "length": "MAX_TOKENS", "filter": "SAFETY"}[finish if not refusal else "filter"]
        parts = [] if text is None else [{"text": text}]
        return {
            "candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": reason, "index": 0}],
            "usageMetadata": {"promptTokenCount": 100, "candidatesTokenCount": 20, "totalTokenCount": 120},
            "modelVersion": f"{model}-001", "responseId": "resp-1",
        }  # fmt: skip
    reason = {"stop": "stop", "length": "length", "filter": "content_filter"}[finish]
    message = {"role": "assistant", "content": text, "refusal": refusal}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": f"{model}-2025-12-11",
        "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }  # fmt: skip


def error_body(kind: str, status: int, code: str = "") -> dict:
    if kind == "anthropic":
        name = {429: "rate_limit_error", 529: "overloaded_error", 401: "authentication_error", 404: "not_found_error"}
        return {"type": "error", "error": {"type": code or name.get(status, "api_error"), "message": f"said {status}"}}
    if kind == "google":
        name = {429: "RESOURCE_EXHAUSTED", 401: "UNAUTHENTICATED", 404: "NOT_FOUND"}.get(status, "INTERNAL")
        return {"error": {"code": status, "message": f"said {status}", "status": name}}
    return {"error": {"message": f"said {status}", "type": "server_error", "code": code or None}}


Answer = Callable[[dict, int], "str | tuple[int, dict, dict | bytes | Iterator[bytes]]"]


class PatientServer(ThreadingHTTPServer):
    """Lets callers queue: beyond the five of the standard library, Linux resets connections that come at once."""

    request_queue_size = 256


class Server:
    """Answers each request with `script(body, number)`: a text, a fault's name, or (status, headers, body).

    The body is JSON, bytes, or a generator of bytes. A text that names a fault is that fault.
    `requests` holds every request received, `bodies` its bytes, `statuses` counts the replies by fault or as answered.
    """

    def __init__(self, kind: str, script: Answer, good: str = "{}", slow_s: float = 3.0):
        self.kind, self.script, self.good, self.slow_s = kind, script, good, slow_s
        self.requests: list[dict] = []
        self.bodies: list[bytes] = []
        self.statuses: Counter[str] = Counter()
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else every reply waits 40 ms for an acknowledgement

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if len(data) < int(self.headers["Content-Length"]):  # the client died while it was sending
                    return
                body = json.loads(data)
                with outer.lock:
                    outer.requests.append({"path": self.path, "headers": dict(self.headers), **body})
                    outer.bodies.append(data)
                    number = len(outer.requests)
                outer._answer(self, body, number)

            def log_message(self, *_: object) -> None:
                pass

        self.http = PatientServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        base = f"http://127.0.0.1:{self.http.server_port}"
        return f"{base}/v1" if self.kind.startswith("openai") else base

    def __enter__(self) -> Server:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict, number: int) -> None:
        said = self.script(body, number)
        with self.lock:
            self.statuses[said if isinstance(said, str) and said in FAULTS else "answered"] += 1
        model = body.get("model", "gemini")
        if said == "slow":
            time.sleep(self.slow_s)
            said = self.good
        if said == "cut":
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", "10000")
            handler.end_headers()
            handler.wfile.write(b'{"id": "')
            handler.close_connection = True
            return
        status, headers, payload = self._reply(said, model)
        if isinstance(payload, Iterator):
            _stream(handler, status, payload)
            return
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _reply(self, said: object, model: str) -> tuple[int, dict, dict | bytes]:
        kind = self.kind
        if isinstance(said, tuple):
            return said
        texts = {"half-json": self.good[: len(self.good) // 2], "wrong-schema": '{"unexpected": 1}', "empty": None}
        match said:
            case "429-after":
                return 429, {"Retry-After": "1"}, error_body(kind, 429)
            case "quota" if kind == "anthropic":
                return 400, {}, error_body(kind, 400, "billing_error")
            case "quota" if kind == "google":
                return 402, {}, error_body(kind, 402)
            case "quota":
                return 429, {}, error_body(kind, 429, "insufficient_quota")
            case "429" | "500" | "529" | "401" | "404":
                return int(said), {}, error_body(kind, int(said))
            case "not-json":
                return 200, {}, b"<html>gateway</html>"
            case "refusal":
                return 200, {}, answer_body(kind, model, None, refusal="I cannot help with that.")
            case "filter" | "length":
                return 200, {}, answer_body(kind, model, self.good[:5], finish=said)
            case "half-json" | "wrong-schema" | "empty":
                return 200, {}, answer_body(kind, model, texts[said])
        return 200, {}, answer_body(kind, model, str(said))


def _stream(handler: BaseHTTPRequestHandler, status: int, payload: Iterator[bytes]) -> None:
    """Send a body of unknown length, until its end or until the client hangs up."""
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    handler.close_connection = True
    with contextlib.suppress(OSError):
        for part in payload:
            handler.wfile.write(part)


def killed_at_random(work: Callable[..., None], arguments: tuple[Any, ...], kills: int, seed: int) -> None:
    """Run `work(*arguments, begun)` in a process that is killed at a random moment after it set `begun`, `kills` times;
    then once more to its end."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    rng = random.Random(seed)
    for kill in range(kills + 1):
        begun = processes.Event()
        child = processes.Process(target=work, args=(*arguments, begun))
        child.start()
        begun.wait()
        if kill < kills:
            time.sleep(rng.uniform(0.0, 0.2))
            child.kill()
        child.join()
    assert child.exitcode == 0
