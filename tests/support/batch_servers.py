"""Real HTTP servers on loopback that take batches of requests, as Anthropic and OpenAI do. Not a test."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hosted_fixtures import GOOD
from provider_server import answer_body, error_body


class AnthropicBatches:
    """Message Batches over HTTP: create, status, results. `fates` gives the result type of a request by its id,
    `answer` the text of its message by what was sent."""

    def __init__(self, answer=lambda sent: GOOD):
        self.answer = answer
        self.created: dict[str, list[dict]] = {}
        self.fates: dict[str, str] = {}
        self.ended = False
        self.refuse_create = False
        self.error = ""  # instead of every state and result
        self.trickles = False  # a space now and then, and never a reply
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path.startswith("/v1/messages/batches")
                outer.created[f"msgbatch_{len(outer.created)}"] = body["requests"]
                if outer.refuse_create:  # the provider has it, and the answer is lost
                    self.close_connection = True
                    return
                self.reply(outer.job(f"msgbatch_{len(outer.created) - 1}"))

            def do_GET(self) -> None:
                batch = self.path.split("?")[0].split("/")[4]
                if outer.error:
                    self.reply({"type": "error", "error": {"type": "x", "message": outer.error}}, 400)
                elif "/results" in self.path:
                    self.reply(b"".join(json.dumps(r).encode() + b"\n" for r in outer.results(batch)))
                else:
                    self.reply(outer.job(batch))

            def reply(self, payload: dict | bytes, status: int = 200) -> None:
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(10**9 if outer.trickles else len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    while outer.trickles:
                        self.wfile.write(b" ")
                        time.sleep(0.02)
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def job(self, batch: str) -> dict:
        n = len(self.created[batch])
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        counts |= {"succeeded": n} if self.ended else {"processing": n}
        when = "2026-01-01T00:00:00Z"
        return {
            "id": batch, "type": "message_batch", "processing_status": "ended" if self.ended else "in_progress",
            "request_counts": counts, "created_at": when, "expires_at": when, "ended_at": when if self.ended else None,
            "archived_at": None, "cancel_initiated_at": None,
            "results_url": f"{self.url}/v1/messages/batches/{batch}/results" if self.ended else None,
        }  # fmt: skip

    def results(self, batch: str):
        for request in self.created[batch]:
            fate = self.fates.get(request["custom_id"], "succeeded")
            result: dict = {"type": fate}
            if fate == "succeeded":
                result["message"] = answer_body("anthropic", "claude-sonnet-4-5", self.answer(request["params"]))
            elif fate == "unreadable":
                result = {"type": "succeeded", "message": answer_body("anthropic", "claude-sonnet-4-5", "Sure!")}
            elif fate == "odd":
                result["message"] = {"id": 7, "content": None, "usage": None}
            elif fate == "errored":
                result["error"] = error_body("anthropic", 500) | {"request_id": None}
            yield {"custom_id": request["custom_id"], "result": result}


class OpenAIBatches:
    """Files and batches of OpenAI over HTTP: all of the one batch is answered with GOOD but what is `refused`."""

    def __init__(self):
        self.requests: list[dict] = []
        self.refused: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/files":
                    lines = [line for line in body.splitlines() if line.startswith(b'{"custom_id"')]
                    outer.requests += map(json.loads, lines)
                    file = {"object": "file", "bytes": 1, "created_at": 1, "filename": "b", "purpose": "batch"}
                    self.reply(json.dumps(file | {"id": "file-in", "status": "processed"}))
                else:
                    self.reply(json.dumps(outer.job()))

            def do_GET(self) -> None:
                if self.path.endswith("/content"):
                    self.reply("".join(json.dumps(outer.result(r)) + "\n" for r in outer.requests))
                else:
                    self.reply(json.dumps(outer.job()))

            def reply(self, text: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def job(self) -> dict:
        n = len(self.requests)
        return {
            "id": "batch_1", "object": "batch", "endpoint": "/v1/responses", "input_file_id": "file-in",
            "completion_window": "24h", "status": "completed", "created_at": 1, "output_file_id": "file-out",
            "request_counts": {"total": n, "completed": n, "failed": 0},
        }  # fmt: skip

    def result(self, request: dict) -> dict:
        part = {"type": "output_text", "text": GOOD, "annotations": []}
        if request["custom_id"] in self.refused:
            part = {"type": "refusal", "refusal": "I cannot help with that."}
        said = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [part]}
        usage = {"input_tokens": 140, "output_tokens": 20, "total_tokens": 160}
        usage |= {"input_tokens_details": {"cached_tokens": 40}, "output_tokens_details": {"reasoning_tokens": 0}}
        body = {
            "id": "resp_1", "object": "response", "created_at": 1, "model": "gpt-5.2-2025-12-11", "output": [said],
            "status": "completed", "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": usage,
        }  # fmt: skip
        response = {"status_code": 200, "request_id": "r", "body": body}
        return {"id": "b", "custom_id": request["custom_id"], "response": response, "error": None}
