"""Language models behind an API: one HTTP request at a time, and a name for every way in which it can end.

pydantic-ai speaks each provider's protocol over the provider's own SDK. Nothing is retried here: an SDK that tries
again unseen would spend money that no record shows.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage, ModelResponse
    from pydantic_ai.models import Model, ModelRequestParameters
    from pydantic_ai.settings import ModelSettings

Kind = Literal["anthropic", "openai", "google", "openai-compatible"]
Structured = Literal["native", "prompted"]
STATUSES = (
    "ok", "parse_error", "refusal", "truncated", "content_filter", "rate_limited", "timeout", "provider_error",
    "budget_stop", "model_retired",
)  # fmt: skip
# Environment variables that hold the key, by kind, the first that is set. A server of one's own may need none.
KEY_VARIABLES: dict[str, tuple[str, ...]] = {
    "anthropic": ("ANTHROPIC_API_KEY",),
    "openai": ("OPENAI_API_KEY",),
    "google": ("GOOGLE_API_KEY", "GEMINI_API_KEY"),
    "openai-compatible": ("OPENAI_COMPATIBLE_API_KEY",),
}
URLS = {
    "anthropic": "https://api.anthropic.com",
    "openai": "https://api.openai.com/v1",
    "google": "https://generativelanguage.googleapis.com",
}
SETTINGS = ("model", "endpoint", "max_tokens", "temperature", "structured", "timeout_s")  # of a Source
# What only a provider can say of an answer; each is None where it said nothing.
RECEIPT = (
    "model_returned", "request_id", "finish_reason", "tokens_in", "tokens_out", "tokens_cached", "tokens_cache_written",
    "tokens_reasoning", "parameters_sent",
)  # fmt: skip


class ProviderError(ValueError):
    """A model cannot be asked: the parameters or the environment must change first; the message says how."""


@dataclass(frozen=True)
class HostedModel:
    """Which model to ask, where, and how. `endpoint` is a base URL; None is the provider's own."""

    kind: Kind
    model: str
    endpoint: str | None = None
    max_tokens: int = 2048
    temperature: float | None = None
    structured: Structured = "native"  # the provider enforces the JSON schema, or the prompt only asks for it
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if self.kind == "openai-compatible" and not self.endpoint:
            raise ProviderError(
                "openai-compatible: no endpoint. Give the server's base URL, as http://127.0.0.1:8000/v1."
            )
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ProviderError(f"endpoint {self.url!r} is not an http(s) URL.")
        if parts.username or parts.password or parts.query:
            raise ProviderError(
                f"endpoint for {self.model}: a URL with credentials or a query would write a secret into the record. "
                f"Give the plain URL, and the key in {' or '.join(KEY_VARIABLES[self.kind])}."
            )
        if parts.scheme == "http" and not self.is_local:
            raise ProviderError(f"endpoint {self.url!r}: a host beyond this network needs https.")

    @property
    def url(self) -> str:
        return self.endpoint or URLS[self.kind]

    @property
    def host(self) -> str:
        """Host and port that will be contacted."""
        return urlsplit(self.url).netloc

    @property
    def is_local(self) -> bool:
        """Whether the host is this machine or an address of a private network: no data leaves the house."""
        name = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(name).is_private
        except ValueError:
            return name == "localhost" or name.endswith((".localhost", ".local", ".internal")) or "." not in name

    def key(self) -> str | None:
        """The API key from the environment. Raises ProviderError if there is none and one is needed."""
        found = next((os.environ[name] for name in KEY_VARIABLES[self.kind] if os.environ.get(name)), None)
        if found is None and self.kind != "openai-compatible":
            raise ProviderError(
                f"{self.kind}: no key for {self.model}. Set the environment variable {' or '.join(KEY_VARIABLES[self.kind])}."
            )
        return found

    def settings(self) -> dict[str, Any]:
        """What decides about an answer, for its identity."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "structured": self.structured}


def hosted_model_from(values: Mapping[str, Any], prefix: str) -> HostedModel | None:
    """The source that parameters name (`generator_model`, `judge_model` and so on), or None for an offline kind.

    Raises ProviderError for a missing model or an endpoint that cannot be used.
    """
    kind = values["generator" if prefix == "generator" else f"{prefix}_kind"]
    if kind not in KEY_VARIABLES:
        return None
    given = {name: values[f"{prefix}_{name}"] for name in SETTINGS}
    if not given["model"]:
        raise ProviderError(f"{prefix}_model: a {kind} {prefix} needs a model id.")
    return HostedModel(kind, **given)


@dataclass(frozen=True)
class Request:
    """One thing to ask. What many questions share comes first, so that providers can cache it: `system`, and `shared`,
    the beginning of the user's part, which goes on with `prompt`.

    `check` says what is wrong with an answer that fits the schema (which not all rules fit into), or None.
    """

    id: str
    system: str
    prompt: str
    schema: type[BaseModel]
    check: Callable[[Any], str | None] = lambda output: None
    shared: str = ""

    @property
    def text(self) -> str:
        """All that is sent, but for the schema."""
        return self.system + self.shared + self.prompt


@dataclass(frozen=True)
class Response:
    """How one request ended.

    `stop`: every further request would end the same way, so none should be sent. `may_be_billed`: the request reached
    the provider and its answer was lost, so it may cost something that nobody can tell.
    """

    status: str
    output: BaseModel | None = None
    raw: str | None = None
    error: str | None = None
    receipt: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(RECEIPT))
    usage: Any = None  # the provider's count of tokens, as genai-prices reads it
    retry_after: float | None = None
    stop: bool = False
    may_be_billed: bool = False


Exchange = tuple[str, str]  # (an answer that could not be read, what was wrong with it)


class ApiClient:
    """One model behind an API. `ask` sends exactly one HTTP request and never raises for what a provider does.

    `batch`: for questions that are handed over in a batch, which not every protocol of a provider takes.
    """

    def __init__(self, source: HostedModel, batch: bool = False):
        self.source = source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # settings that a model does not take; what was sent is in the record
            self.client = _client(source)
            self.model = _open_model(source, self.client, batch)

    async def ask(self, question: Request, failed: Sequence[Exchange] = ()) -> Response:
        """Ask, or ask again after the `failed` answers with what was wrong with them."""
        from pydantic_ai.direct import model_request
        from pydantic_ai.exceptions import AgentRunError, UserError

        sent: dict[str, Any] = {}
        token = _sent.set(sent)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                response = await model_request(
                    self.model,
                    messages(question, failed, self.source),
                    model_settings=self.settings(),
                    model_request_parameters=request_parameters(question, self.source.structured),
                )
            return read_response(response, question, sent)
        except (AgentRunError, ValueError) as error:  # ValueError: a body that is no JSON; SDKs raise it unwrapped
            if isinstance(error, UserError):
                raise ProviderError(str(error)) from error
            return failed_response(error, self.source, sent)
        finally:
            _sent.reset(token)

    async def close(self) -> None:
        await self.client.aclose()

    def settings(self, live: bool = True) -> ModelSettings:
        """Settings of a request; a live one has a deadline and is never repeated by the SDK."""
        from pydantic_ai.settings import ModelSettings

        wanted: dict[str, Any] = {"max_tokens": self.source.max_tokens, "cache": {"messages": False}}
        if self.source.temperature is not None:
            wanted["temperature"] = self.source.temperature
        if self.source.kind == "openai" and not live:
            wanted["openai_store"] = False  # the protocol that batches speak keeps answers for 30 days by default
        if live:
            wanted |= {"timeout": self.source.timeout_s, "request_timeout": self.source.timeout_s, "max_retries": 0}
        return ModelSettings(**wanted)


_sent: ContextVar[dict[str, Any] | None] = ContextVar("sent", default=None)


async def _note_request(request: Any) -> None:
    """Keep what really goes over the wire, texts and schema as hashes: some models silently drop a temperature."""
    noted = _sent.get()
    if noted is not None and request.content:
        noted |= _short(json.loads(request.content))


_TEXTS = {"messages", "system", "contents", "systemInstruction"}


def _short(body: dict[str, Any], limit: int = 120) -> dict[str, Any]:
    """Settings as they are, texts and whatever is long as their hash."""
    short: dict[str, Any] = {}
    for key, value in body.items():
        text = json.dumps(value, sort_keys=True)
        if len(text) <= limit and key not in _TEXTS:
            short[key] = value
        elif isinstance(value, dict) and key not in _TEXTS:
            short[key] = _short(value)
        else:
            short[key] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return short


def _client(source: HostedModel) -> Any:
    """An HTTP client that notes what it sends. No redirect is followed: data goes to the named host alone."""
    import httpx2

    limits = httpx2.Limits(max_connections=200)
    hooks = {"request": [_note_request]}
    return httpx2.AsyncClient(timeout=source.timeout_s, event_hooks=hooks, follow_redirects=False, limits=limits)


def _open_model(source: HostedModel, client: Any, batch: bool) -> Model:
    """The pydantic-ai model of a source, over the provider's SDK."""
    key = source.key()
    if source.kind == "anthropic":
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        provider = AnthropicProvider(api_key=key, base_url=source.url, http_client=client)
        return AnthropicModel(source.model, provider=provider)
    if source.kind == "google":
        from pydantic_ai.models.google import GoogleModel
        from pydantic_ai.providers.google import GoogleProvider

        return GoogleModel(source.model, provider=GoogleProvider(api_key=key, base_url=source.url, http_client=client))
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

    if source.kind == "openai":
        from pydantic_ai.providers.openai import OpenAIProvider

        speaking = OpenAIResponsesModel if batch else OpenAIChatModel
        return speaking(source.model, provider=OpenAIProvider(api_key=key, base_url=source.url, http_client=client))
    from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider

    # The SDK wants some key even where the server wants none.
    own = OpenAICompatibleProvider("own-server", base_url=source.url, api_key=key or "none", http_client=client)
    return OpenAIChatModel(source.model, provider=own)


# ---------------------------------------------------------------- what is sent


def messages(question: Request, failed: Sequence[Exchange], source: HostedModel) -> list[ModelMessage]:
    """The conversation with the model: the question, then each unreadable answer with what was wrong with it."""
    from pydantic_ai.messages import CachePoint, ModelRequest, ModelResponse, SystemPromptPart, TextPart, UserPromptPart

    system = question.system + (_schema_text(question.schema) if source.structured == "prompted" else "")
    marked = is_cached_by_mark(source, system + question.shared)
    said = [question.shared, CachePoint(), question.prompt] if marked else question.shared + question.prompt
    turns: list[ModelMessage] = [ModelRequest(parts=[SystemPromptPart(content=system), UserPromptPart(content=said)])]
    for raw, wrong in failed:
        turns.append(ModelResponse(parts=[TextPart(content=raw or "(nothing)")]))
        again = f"That could not be read: {wrong}\nReply again with the JSON object alone."
        turns.append(ModelRequest(parts=[UserPromptPart(content=again)]))
    return turns


def is_cached_by_mark(source: HostedModel, beginning: str) -> bool:
    """Whether the provider caches this beginning of a prompt if, and only if, its end is marked.

    Anthropic does, from a number of tokens that depends on the model (a mark on less is ignored and costs nothing):
    1,024 for most, 2,048 or more for small ones, taken here as 4 characters each. OpenAI and Google need no mark.
    A write to the cache costs 1.25 times the price of a token, a read a tenth.
    """
    least = 2048 if "haiku" in source.model else 1024
    return source.kind == "anthropic" and len(beginning) >= 4 * least


def _schema_text(schema: type[BaseModel]) -> str:
    text = json.dumps(schema.model_json_schema(), separators=(",", ":"))
    return f"\n\nReply with one JSON object that fits this JSON schema, and with nothing else:\n{text}"


def request_parameters(question: Request, structured: Structured) -> ModelRequestParameters:
    """Asks for JSON of the question's schema by the provider's own means, or for plain text."""
    from pydantic_ai.models import ModelRequestParameters
    from pydantic_ai.output import OutputObjectDefinition

    if structured == "prompted":
        return ModelRequestParameters(output_mode="text", allow_text_output=True)
    described = OutputObjectDefinition(
        json_schema=question.schema.model_json_schema(), name=question.schema.__name__, strict=True
    )
    return ModelRequestParameters(output_mode="native", output_object=described, allow_text_output=True)


# ---------------------------------------------------------------- what comes back


def read_response(response: ModelResponse, question: Request, sent: dict[str, Any]) -> Response:
    """The outcome of a response. The finish reason is looked at before the text is parsed."""
    raw = response.text
    details = response.provider_details or {}
    finished = details.get("finish_reason") or response.finish_reason
    usage = response.usage
    receipt = {
        "model_returned": response.model_name,
        "request_id": response.provider_response_id,
        "finish_reason": str(finished) if finished else None,
        "tokens_in": usage.input_tokens,
        "tokens_out": usage.output_tokens,
        "tokens_cached": usage.cache_read_tokens,
        "tokens_cache_written": usage.cache_write_tokens,
        "tokens_reasoning": (usage.details or {}).get("reasoning_tokens"),
        "parameters_sent": sent or None,
    }
    ended = {"raw": raw, "receipt": receipt, "usage": usage}
    if details.get("refusal") or finished == "refusal":
        return Response("refusal", error=str(details.get("refusal") or "the model refused"), **ended)
    if response.finish_reason == "content_filter":
        return Response("content_filter", error=f"stopped by the provider's filter ({finished})", **ended)
    if response.finish_reason == "length":
        return Response("truncated", error=f"cut off after {usage.output_tokens} tokens", **ended)
    if response.finish_reason not in ("stop", None):
        return Response("provider_error", error=f"finished with {finished}", **ended)
    output, wrong = parse(raw, question.schema)
    wrong = wrong or question.check(output)
    output = None if wrong else output
    return Response("ok" if output else "parse_error", output=output, error=wrong, **ended)


_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)


def parse(raw: str | None, schema: type[BaseModel]) -> tuple[BaseModel | None, str | None]:
    """(the object, None), or (None, what is wrong). The whole text must be one JSON object, at most inside one fence.

    JSON is never searched for inside other text: an answer under judgement may hold a verdict of its own making.
    """
    if not raw or not raw.strip():
        return None, "the reply is empty"
    fenced = _FENCE.fullmatch(raw)
    try:
        return schema.model_validate_json(fenced[1] if fenced else raw, strict=True), None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return None, f"{where}: {first['msg']}" if where else first["msg"]


def failed_response(error: Exception, source: HostedModel, sent: dict[str, Any]) -> Response:
    """The outcome of a request that ended in an exception, by pydantic-ai's categories."""
    from pydantic_ai import exceptions as e

    text = _redacted(" ".join(str(error).split())[:500], source)
    receipt = dict.fromkeys(RECEIPT) | {"parameters_sent": sent or None}
    ended: dict[str, Any] = {"error": text, "receipt": receipt, "retry_after": getattr(error, "retry_after", None)}
    names = " or ".join(KEY_VARIABLES[source.kind])
    match error:
        case e.ContentFilterError():
            return Response("content_filter", **ended)
        case e.ModelNotFoundError():
            ended["error"] = (
                f"{source.host} does not know the model {source.model!r}; it may have been retired. "
                f"Set another model id in the parameter file (and check the endpoint). It said: {text}"
            )
            return Response("model_retired", stop=True, **ended)
        case e.ModelAuthenticationError():
            ended["error"] = f"{source.host} refused the key. Set a valid one in {names}. It said: {text}"
            return Response("provider_error", stop=True, **ended)
        case e.ModelQuotaExceededError() | e.ModelHTTPError(status_code=402):
            ended["error"] = f"{source.host}: the account's quota or credit is used up. It said: {text}"
            return Response("provider_error", stop=True, **ended)
        case e.ModelRateLimitError():
            return Response("rate_limited", **ended)
        case e.ModelTimeoutError() | e.ModelRequestTimeout():
            return Response("timeout", may_be_billed=True, **ended)
        case e.ModelConnectionError(phase="pool" | "connect"):
            return Response("provider_error", **ended)
        case _:
            return Response("provider_error", may_be_billed=not isinstance(error, e.ModelHTTPError), **ended)


def _redacted(text: str, source: HostedModel) -> str:
    """The text without the key, should a provider echo it."""
    key = source.key()
    return text.replace(key, "[key]") if key else text
