"""Sends single HTTP requests to hosted language models and gives every possible end of a request a status.

pydantic-ai speaks each provider's protocol through the provider's own SDK. Nothing is retried here: an SDK that retries
on its own would spend money that no record shows.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from telco_nb.hosted import egress
from telco_nb.hosted.hosts import Address, AddressError, parse_address
from telco_nb.hosted.keys import KEY_VARIABLES, keys_of, redact_whole, safe

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage, ModelResponse
    from pydantic_ai.models import Model, ModelRequestParameters
    from pydantic_ai.settings import ModelSettings
    from pydantic_ai.usage import RequestUsage

Kind = Literal["anthropic", "openai", "google", "openai-compatible"]
STATUSES = (
    "ok", "parse_error", "refusal", "truncated", "content_filter", "rate_limited", "timeout", "provider_error",
    "budget_stop", "model_retired",
)  # fmt: skip
URLS = {
    "anthropic": "https://api.anthropic.com",
    "openai": "https://api.openai.com/v1",
    "google": "https://generativelanguage.googleapis.com",
}
LONGEST_PAUSE_S = 300.0  # that a provider may ask for; a longer one ends the run
SETTINGS = ("model", "endpoint", "max_tokens", "temperature", "structured", "timeout_s")  # fields of a HostedModel
# Facts about an answer that only the provider knows; each is None if the provider did not report it.
RECEIPT = (
    "model_returned", "request_id", "finish_reason", "tokens_in", "tokens_out", "tokens_cached", "tokens_cache_written",
    "tokens_reasoning", "parameters_sent",
)  # fmt: skip


class ProviderError(ValueError):
    """The parameters or the environment do not allow a request; the message says what to change."""


@dataclass(frozen=True)
class HostedModel:
    """A model, its address and its settings. `endpoint` is a base URL; None stands for the provider's own.

    `structured`: with "native" the provider enforces the JSON schema, with "prompted" only the prompt asks for it.
    `purpose` (generator or judge) and `parameter` (the one that chooses the host) are for logs and messages.
    """

    kind: Kind
    model: str
    endpoint: str | None = None
    max_tokens: int = 2048
    temperature: float | None = None
    structured: Literal["native", "prompted"] = "native"
    timeout_s: float = 120.0
    purpose: str = field(default="unknown", compare=False)
    parameter: str = field(default="endpoint", compare=False)

    def __post_init__(self) -> None:
        if self.kind == "openai-compatible" and not self.endpoint:
            raise ProviderError(
                "openai-compatible: no endpoint. Give the server's base URL, such as http://127.0.0.1:8000/v1."
            )
        if self.address.scheme == "http" and not self.is_local:
            raise ProviderError(
                f"{self.parameter} {self.url!r}: a host outside this network needs https. Only an address of this "
                "network, or a name that resolves to such addresses alone, is inside it."
            )
        for name in ("max_tokens", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ProviderError(f"{name} of {self.model}: {getattr(self, name)} is not a number above 0.")

    @cached_property
    def address(self) -> Address:
        """Where the requests go. Raises ProviderError if the endpoint is not the base URL of a server."""
        try:
            return parse_address(self.endpoint or URLS[self.kind])
        except AddressError as error:
            raise ProviderError(
                f"{self.parameter} of {self.model}: {error}. Give the server's plain base URL, such as "
                f"http://127.0.0.1:8000/v1, and set the key in {self.key_names}."
            ) from None

    @property
    def url(self) -> str:
        return self.address.url

    @property
    def host(self) -> str:
        """Host and port that receive the requests."""
        return self.address.netloc

    @property
    def is_local(self) -> bool:
        """True if the host is this machine or lies in a private network, so that no data leaves the network."""
        return self.address.reach != "remote"

    @property
    def key_names(self) -> str:
        """The environment variables that may hold the API key, as text."""
        return " or ".join(KEY_VARIABLES[self.kind])

    def key(self) -> str | None:
        """The API key from the environment. Raises ProviderError if there is none and one is needed."""
        key = next(iter(keys_of(self.kind)), None)
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise ProviderError(f"{self.key_names}: the key holds a space or another character that no key has.")
        if key is None and self.kind != "openai-compatible":
            raise ProviderError(f"{self.kind}: no key for {self.model}. Set the environment variable {self.key_names}.")
        return key

    def settings(self) -> dict[str, Any]:
        """The settings that can change an answer; they are part of a request's id."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "structured": self.structured}


def hosted_model_from(values: Mapping[str, Any], prefix: str) -> HostedModel | None:
    """Reads a hosted model from parameters such as `judge_model` and `judge_max_tokens`.

    Args:
        values: the parameters of a step.
        prefix: "generator" or "judge".

    Returns:
        The model, or None if the generator or judge works offline.

    Raises:
        ProviderError: the model id is missing, or the endpoint cannot be used.
    """
    kind_name = "generator" if prefix == "generator" else f"{prefix}_kind"
    kind = values[kind_name]
    if kind not in KEY_VARIABLES:
        return None
    settings = {name: values[f"{prefix}_{name}"] for name in SETTINGS}
    if not settings["model"]:
        raise ProviderError(f"{prefix}_model: a {kind} {prefix} needs a model id.")
    parameter = f"{prefix}_endpoint" if settings["endpoint"] else kind_name
    return HostedModel(kind, **settings, purpose=prefix, parameter=parameter)


@dataclass(frozen=True)
class Request:
    """One request. `system` and then `shared`, the first part of the user's message, come before `prompt`: providers
    can cache a beginning that many requests have in common.

    `check` returns the fault of an answer that fits the schema but breaks a rule that no schema can express, or None.
    """

    id: str
    system: str
    prompt: str
    schema: type[BaseModel]
    check: Callable[[Any], str | None] = lambda output: None
    shared: str = ""

    @property
    def text(self) -> str:
        """All text that is sent, without the schema."""
        return self.system + self.shared + self.prompt


@dataclass(frozen=True)
class Response:
    """The end of one request.

    `stop`: every further request would end in the same way, so none should be sent. `may_be_billed`: the request
    reached the provider and its answer was lost, so it may have cost an unknown amount.
    """

    status: str
    output: BaseModel | None = None
    raw: str | None = None
    error: str | None = None
    receipt: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(RECEIPT))
    usage: RequestUsage | None = None  # the provider's count of tokens
    retry_after: float | None = None  # seconds
    stop: bool = False
    may_be_billed: bool = False


UnreadableReply = tuple[str, str]  # (the reply, its fault)


class ApiClient:
    """A client for one hosted model. `ask` sends exactly one HTTP request and never raises for a provider's failure.

    Nothing in the environment but the key counts: no proxy, no other host, no other account.

    `batch`: the client is for batches, which not every protocol of a provider supports.
    """

    def __init__(self, hosted_model: HostedModel, batch: bool = False):
        import httpx2

        from telco_nb.hosted import transport

        egress.require_allowed(hosted_model.address, hosted_model.parameter)
        egress.drop_ignored_variables()
        self.hosted_model = hosted_model
        purpose = f"{hosted_model.purpose}, batch" if batch else hosted_model.purpose
        limit = transport.BATCH_BYTES if batch else transport.LIVE_BYTES
        self.transport = transport.GuardedTransport(hosted_model.address, purpose, limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about settings that a model ignores; the record shows what was sent
            self.http = httpx2.AsyncClient(
                timeout=hosted_model.timeout_s,
                event_hooks={"request": [_record_body]},
                follow_redirects=False,  # data goes to the named host alone
                trust_env=False,  # no proxy and no .netrc of the environment
                transport=self.transport,
            )
            self.model = _open_model(hosted_model, self.http, batch)

    async def ask(self, request: Request, unreadable: Sequence[UnreadableReply] = ()) -> Response:
        """Sends a request, together with earlier replies to it that could not be read.

        Every end is a response, also that of a reply which an SDK cannot digest.

        Raises ProviderError if pydantic-ai refuses the parameters.
        """
        from pydantic_ai.direct import model_request
        from pydantic_ai.exceptions import UserError

        sent: dict[str, Any] = {}
        turns, settings = messages(request, unreadable, self.hosted_model), self.settings()
        parameters = request_parameters(request, self.hosted_model)
        token = _sent.set(sent)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reply = await model_request(
                    self.model, turns, model_settings=settings, model_request_parameters=parameters
                )
        except UserError as error:
            raise ProviderError(safe(error)) from None
        except Exception as error:  # of the SDK, in any of its ways
            response = failed_response(error, self.hosted_model)
        else:
            response = read_response(reply, request)
        finally:
            _sent.reset(token)
        response.receipt["parameters_sent"] = sent or None
        return response

    async def close(self) -> None:
        await self.http.aclose()

    def settings(self, live: bool = True) -> ModelSettings:
        """Settings of a request. A live request has a deadline, and the SDK never repeats it."""
        from pydantic_ai.settings import ModelSettings

        model = self.hosted_model
        settings: dict[str, Any] = {"max_tokens": model.max_tokens, "cache": {"messages": False}}
        if model.temperature is not None:
            settings["temperature"] = model.temperature
        if model.kind == "openai" and not live:
            settings["openai_store"] = False  # OpenAI's batch protocol keeps answers for 30 days by default
        if live:
            settings |= {"timeout": model.timeout_s, "request_timeout": model.timeout_s, "max_retries": 0}
        return ModelSettings(**settings)


# The body of the request under way; some models silently drop a setting, so the record shows what was really sent.
_sent: ContextVar[dict[str, Any] | None] = ContextVar("sent", default=None)
_TEXTS = {"messages", "system", "contents", "systemInstruction"}


async def _record_body(http_request: Any) -> None:
    body = _sent.get()
    if body is not None and http_request.content:
        body |= _without_texts(json.loads(http_request.content))


def _without_texts(body: dict[str, Any], limit: int = 120) -> dict[str, Any]:
    """The body with its texts and long values replaced by their hashes."""
    short: dict[str, Any] = {}
    for key, value in body.items():
        text = json.dumps(value, sort_keys=True)
        if len(text) <= limit and key not in _TEXTS:
            short[key] = value
        elif isinstance(value, dict) and key not in _TEXTS:
            short[key] = _without_texts(value)
        else:
            short[key] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return short


def _open_model(hosted_model: HostedModel, http: Any, batch: bool) -> Model:
    """The pydantic-ai model, over the provider's SDK."""
    from pydantic_ai.models import infer_model
    from pydantic_ai.providers import infer_provider_class

    kind, name, key = hosted_model.kind, hosted_model.model, hosted_model.key()
    address: dict[str, Any] = {"base_url": hosted_model.url, "http_client": http}
    if kind == "openai-compatible":
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider

        # The SDK requires a key even where the server does not.
        return OpenAIChatModel(name, provider=OpenAICompatibleProvider("own-server", api_key=key or "none", **address))
    protocol = "openai-chat" if kind == "openai" and not batch else kind  # "openai" is the protocol of its batches
    provider: Any = infer_provider_class(protocol)
    return infer_model(f"{protocol}:{name}", lambda _: provider(api_key=key, **address))


# ---------------------------------------------------------------- requests


def messages(request: Request, unreadable: Sequence[UnreadableReply], hosted_model: HostedModel) -> list[ModelMessage]:
    """The conversation to send.

    Args:
        request: the request.
        unreadable: earlier replies to it, each with its fault.
        hosted_model: the model that receives it.
    """
    from pydantic_ai.messages import CachePoint, ModelRequest, ModelResponse, SystemPromptPart, TextPart, UserPromptPart

    system = request.system
    if hosted_model.structured == "prompted":
        schema = json.dumps(request.schema.model_json_schema(), separators=(",", ":"))
        system += f"\n\nReply with one JSON object that fits this JSON schema, and with nothing else:\n{schema}"
    # Anthropic caches a beginning only if its end is marked, and only from 1,024 tokens on (small models: 2,048), here
    # 4 characters each. OpenAI and Google need no mark. A cache write costs 1.25 times a token, a read a tenth.
    least = 4 * (2048 if "haiku" in hosted_model.model else 1024)
    long_enough = len(system + request.shared) >= least
    marked = hosted_model.kind == "anthropic" and request.shared and long_enough  # a mark must follow a text
    user = [request.shared, CachePoint(), request.prompt] if marked else request.shared + request.prompt
    turns: list[ModelMessage] = [ModelRequest(parts=[SystemPromptPart(content=system), UserPromptPart(content=user)])]
    for raw, fault in unreadable:
        turns.append(ModelResponse(parts=[TextPart(content=raw or "(nothing)")]))
        again = f"That could not be read: {fault}\nReply again with the JSON object alone."
        turns.append(ModelRequest(parts=[UserPromptPart(content=again)]))
    return turns


def request_parameters(request: Request, hosted_model: HostedModel) -> ModelRequestParameters:
    """Parameters that ask for JSON of the request's schema ("native") or for plain text ("prompted")."""
    from pydantic_ai.models import ModelRequestParameters
    from pydantic_ai.output import OutputObjectDefinition

    if hosted_model.structured == "prompted":
        return ModelRequestParameters(output_mode="text", allow_text_output=True)
    schema = request.schema
    output = OutputObjectDefinition(json_schema=schema.model_json_schema(), name=schema.__name__, strict=True)
    return ModelRequestParameters(output_mode="native", output_object=output, allow_text_output=True)


# ---------------------------------------------------------------- responses


def read_response(reply: ModelResponse, request: Request) -> Response:
    """Reads a provider's reply to a request; the finish reason decides before the text is parsed.

    The text is parsed as the model wrote it, and kept without the API keys that it may hold.
    """
    details = reply.provider_details or {}
    finish_reason = details.get("finish_reason") or reply.finish_reason
    usage = reply.usage
    receipt = {
        "model_returned": reply.model_name and safe(reply.model_name, redact_whole),
        "request_id": reply.provider_response_id and safe(reply.provider_response_id, redact_whole),
        "finish_reason": safe(finish_reason, redact_whole) if finish_reason else None,
        "tokens_in": usage.input_tokens,
        "tokens_out": usage.output_tokens,
        "tokens_cached": usage.cache_read_tokens,
        "tokens_cache_written": usage.cache_write_tokens,
        "tokens_reasoning": (usage.details or {}).get("reasoning_tokens"),
    }
    text = reply.text
    common: dict[str, Any] = {"raw": text and redact_whole(text), "receipt": receipt, "usage": usage}
    if details.get("refusal") or finish_reason == "refusal":
        return Response("refusal", error=safe(details.get("refusal") or "the model refused"), **common)
    if reply.finish_reason == "content_filter":
        reason = f"stopped by the provider's filter ({receipt['finish_reason']})"
        return Response("content_filter", error=reason, **common)
    if reply.finish_reason == "length":
        return Response("truncated", error=f"cut off after {usage.output_tokens} tokens", **common)
    if reply.finish_reason not in ("stop", None):
        return Response("provider_error", error=f"finished with {receipt['finish_reason']}", **common)
    output, fault = parse(text, request.schema)
    fault = fault or request.check(output)
    if output is None or fault:
        return Response("parse_error", error=safe(fault), **common)
    return Response("ok", output=_without_keys(output), **common)


def _without_keys(output: BaseModel) -> BaseModel:
    """A parsed reply whose texts hold no whole key; the values and the other texts stay as they are."""
    said = output.model_dump_json()
    kept = redact_whole(said)
    return output if kept == said else type(output).model_validate_json(kept)


_FENCE = re.compile(r"\s*```(?:json)?\s*(.*)```\s*", re.DOTALL | re.IGNORECASE)
_END_OF_REASONING = "</think>"  # servers of reasoning models may leave the reasoning in the text, often without <think>


def parse(raw: str | None, schema: type[BaseModel]) -> tuple[BaseModel | None, str | None]:
    """Parses a reply: (the object, None) or (None, the fault). It must be one JSON object, at most in one code fence.

    What a reasoning model writes up to its last </think> is not read. JSON inside other text is never accepted: an
    answer under judgement may contain a verdict of its own.
    """
    if not raw or not raw.strip():
        return None, "the reply is empty"
    raw = raw.rpartition(_END_OF_REASONING)[2]
    fenced = _FENCE.fullmatch(raw)
    try:
        return schema.model_validate_json(fenced[1] if fenced else raw, strict=True), None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return None, f"{where}: {first['msg']}" if where else first["msg"]


def failed_response(error: Exception, hosted_model: HostedModel) -> Response:
    """The response for a request that ended in an exception, by pydantic-ai's categories.

    A provider that asks for a pause longer than `LONGEST_PAUSE_S` ends the run.
    """
    response = _by_category(error, hosted_model)
    pause = response.retry_after
    if pause is None or pause <= LONGEST_PAUSE_S or response.stop:
        return response
    text = (
        f"{hosted_model.host} asks for a pause of {pause:,.0f} s; at most {LONGEST_PAUSE_S:,.0f} s are waited for. "
        f"Run again later. The host's message: {response.error}"
    )
    return replace(response, status="rate_limited", error=text, retry_after=None, stop=True)


def _by_category(error: Exception, hosted_model: HostedModel) -> Response:
    from pydantic_ai import exceptions as e

    host, text = hosted_model.host, safe(_with_cause(error))
    common: dict[str, Any] = {"error": text, "retry_after": getattr(error, "retry_after", None)}
    match error:
        case e.ContentFilterError():
            return Response("content_filter", **common)
        case e.ModelNotFoundError():
            common["error"] = (
                f"{host} does not know the model {hosted_model.model!r}; it may have been retired. "
                f"Set another model id in the parameter file (and check the endpoint). The host's message: {text}"
            )
            return Response("model_retired", stop=True, **common)
        case e.ModelAuthenticationError():
            names = hosted_model.key_names
            common["error"] = f"{host} refused the key. Set a valid one in {names}. The host's message: {text}"
            return Response("provider_error", stop=True, **common)
        case e.ModelQuotaExceededError() | e.ModelHTTPError(status_code=402):
            common["error"] = f"{host}: the account's quota or credit is used up. The host's message: {text}"
            return Response("provider_error", stop=True, **common)
        case e.ModelRateLimitError():
            return Response("rate_limited", **common)
        case e.ModelTimeoutError() | e.ModelRequestTimeout():
            return Response("timeout", may_be_billed=True, **common)
        case e.ModelConnectionError(phase="pool" | "connect"):
            return Response("provider_error", **common)
        case _:
            return Response("provider_error", may_be_billed=not isinstance(error, e.ModelHTTPError), **common)


def _with_cause(error: BaseException) -> str:
    """The text of an error and of the one that began it: SDKs say "Connection error." for all that goes wrong."""
    from pydantic_ai.exceptions import AgentRunError

    texts, cause = [safe(error)], error
    while cause.__cause__ is not None and len(texts) < 5:
        cause = cause.__cause__
        texts.append(safe(cause))
    known = isinstance(error, AgentRunError)
    first = texts[0] if known else f"the reply could not be read ({type(error).__name__}: {texts[0]})"
    return first if texts[-1] in first else f"{first} ({texts[-1]})"
