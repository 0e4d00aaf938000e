"""A conversation as the model reads it: one rendering for training, answering and chat.

A template is the model's own and trusted; what people write is not. `<|im_end|>` in a customer's message is eleven
characters, and never the token that ends a turn.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError

from telco_nb.lora.errors import ModelError

SYSTEM_PROMPT = "You are a support agent of a telecom operator."
SPLIT = "\ufdd0"  # a noncharacter, which Unicode keeps out of texts: it holds the parts of a forged token apart
COMPARED = 16  # texts at both ends of a batch that are read in two ways
INVISIBLE = "\u200b"  # a space of no width
# Both go in front of a chat template.
GUARD = """{{%- if not messages or messages[0].role != 'system' -%}}
{{%- set messages = [dict(role='system', content={system!r})] + messages|list -%}}
{{%- endif -%}}
{{%- set safe = namespace(messages=[]) -%}}
{{%- for message in messages -%}}
{{%- set text = message.content -%}}
{{%- if text is string %}}{replacements}{{% endif -%}}
{{%- set safe.messages = safe.messages + [dict(message, content=text)] -%}}
{{%- endfor -%}}
{{%- set messages = safe.messages %}}"""
FOLD = r"""{%- if messages[0].role == 'system' and messages|length > 1 -%}
{%- set text = messages[0].content + '\n\n' + messages[1].content -%}
{%- set messages = [dict(messages[1], content=text)] + messages[2:] -%}
{%- endif %}"""


def fit_messages(tokenizer: Any, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages as plain role/content dicts that the chat template takes.

    The system prompt stands in front unless they have one. A template without a system role gets its text at the head
    of the first user message.
    """
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    if plain[0]["role"] != "system":
        plain = [{"role": "system", "content": SYSTEM_PROMPT}, *plain]
    if _takes_system(tokenizer, _template(tokenizer)):
        return plain
    system, first, *others = plain
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *others]


def _template(tokenizer: Any) -> str:
    """The chat template, or several by name, as text: part of a cache's key."""
    return str(getattr(tokenizer, "chat_template", None))


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of all that decides how a conversation becomes tokens: core, template and the end of text."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    text = core.to_str() if core else repr(sorted(tokenizer.get_vocab().items()))
    parts = (text, _template(tokenizer), repr(sorted(control_tokens(tokenizer))), str(tokenizer.eos_token_id))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@lru_cache(maxsize=8)
def _takes_system(tokenizer: Any, template: str) -> bool:
    """False if the template (the second part of the cache's key) refuses a system message or drops its text."""
    made = set()
    for text in ("a", "bb"):
        chat = [{"role": "system", "content": text}, {"role": "user", "content": "c"}]
        try:
            made.add(tokenizer.apply_chat_template(chat, tokenize=False))
        except TemplateError:
            return False
    return len(made) == 2


def render(tokenizer: Any, chat: list[dict[str, str]], generation: bool = False) -> list[int]:
    """Token ids of one conversation, as `render_all` gives them."""
    return render_all(tokenizer, [(chat, generation)])[0].ids


class Rendered(NamedTuple):
    """A conversation as text and as token ids."""

    text: str
    ids: list[int]


def render_all(tokenizer: Any, chats: Sequence[tuple[list[dict[str, str]], bool]]) -> list[Rendered]:
    """Conversations from `fit_messages` as text and token ids. No text in a message becomes a control token.

    Args:
        tokenizer: of the base model. It reads all conversations together, by its own threads.
        chats: the messages of each conversation, and whether the head of the assistant's next turn follows.

    Raises:
        ModelError: the template refuses a conversation, or the tokenizer cannot keep a forged token apart.
    """
    pattern = _control_pattern(tokenizer)
    texts = [_apply(tokenizer, chat, tokenize=False, add_generation_prompt=generation) for chat, generation in chats]
    forged = {i for i, (chat, _) in enumerate(chats) if pattern and any(pattern.search(m["content"]) for m in chat)}
    plain = [text for i, text in enumerate(texts) if i not in forged]
    ids = iter(_encode_all(tokenizer, pattern, plain))
    return [
        Rendered(text, _split_ids(tokenizer, pattern, *chats[i]) if i in forged else next(ids))
        for i, text in enumerate(texts)
    ]


def _encode_all(tokenizer: Any, pattern: re.Pattern[str] | None, texts: list[str]) -> list[list[int]]:
    """Token ids of texts. What stands between two control tokens is read once, however many texts hold it.

    A conversation and the heads of its turns share nearly everything. A tokenizer cuts a text at its control tokens
    before it reads on, with exceptions (a space in front of the first word, say): the first and the last texts are
    read as a whole, too, and all of them where that makes a difference.
    """

    def whole(chosen: list[str]) -> list[list[int]]:
        return tokenizer(chosen, add_special_tokens=False)["input_ids"] if chosen else []

    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or pattern is None or len(texts) <= 2 * COMPARED:
        return whole(texts)
    cuts = re.compile(f"({pattern.pattern})")
    pieces = [cuts.split(text) for text in texts]
    different = list(dict.fromkeys(chain.from_iterable(pieces)))
    read = zip(different, core.encode_batch_fast(different, add_special_tokens=False), strict=True)
    ids = {piece: encoding.ids for piece, encoding in read}
    joined = [[*chain.from_iterable(map(ids.__getitem__, found))] for found in pieces]
    ends = [*range(COMPARED), *range(-COMPARED, 0)]
    same = [joined[i] for i in ends] == whole([texts[i] for i in ends])
    return joined if same else whole(texts)


def _split_ids(tokenizer: Any, pattern: Any, chat: list[dict[str, str]], generation: bool) -> list[int]:
    """Token ids of a conversation in which a message holds the text of a control token."""
    backend, split_id = _splitting_backend(tokenizer)
    safe = [m | {"content": pattern.sub(_split, m["content"])} for m in chat]
    text = _apply(tokenizer, safe, tokenize=False, add_generation_prompt=generation)
    return [i for i in backend.encode(text, add_special_tokens=False).ids if i != split_id]


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation that the assistant is to answer."""
    return render(tokenizer, fit_messages(tokenizer, messages), generation=True)


def _apply(tokenizer: Any, chat: list[dict[str, str]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(chat, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in chat)
        raise ModelError(
            f"base_model: its chat template refuses a conversation of {roles} ({error}). Use another base_model."
        ) from error


def _split(found: re.Match[str]) -> str:
    return f"{found[0][0]}{SPLIT}{found[0][1:]}"


@lru_cache(maxsize=8)
def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Text and id of the tokens that steer the model. Others that were added are only frequent texts: spaces, say."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {t.content: i for i, t in added.items() if t.special or any(map(str.isalnum, t.content))}


@lru_cache(maxsize=8)
def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    texts = sorted((text for text in control_tokens(tokenizer) if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


@lru_cache(maxsize=2)
def _splitting_backend(tokenizer: Any) -> tuple[Any, int]:
    """A copy of the tokenizer's core that takes SPLIT for a token, and that token's id."""
    from tokenizers import AddedToken

    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise ModelError(
            "base_model: a message holds the text of a control token, and this tokenizer (without tokenizer.json) "
            "cannot read it as text. Remove it from the data, or use another base_model."
        )
    backend = copy.deepcopy(core)
    backend.no_padding()
    backend.no_truncation()
    backend.add_tokens([AddedToken(SPLIT, normalized=False, special=False)])
    return backend, backend.token_to_id(SPLIT)


def guarded_template(tokenizer: Any) -> str:
    """The chat template for a server that renders by itself: what `fit_messages` and `render` do, in the template.

    A request without a system message gets the one that the model was trained with, and not a template's own. Forged
    control tokens get a space of no width inside: a template cannot keep them apart without a character.
    """
    sets = [
        f"{{%- set text = text|replace({text!r}, {text[0] + INVISIBLE + text[1:]!r}) -%}}"
        for text in control_tokens(tokenizer)
        if len(text) > 1
    ]
    fold = "" if _takes_system(tokenizer, _template(tokenizer)) else FOLD
    return GUARD.format(system=SYSTEM_PROMPT, replacements="".join(sets)) + fold + tokenizer.get_chat_template()


def end_token_id(tokenizer: Any) -> int:
    """The token that ends an answer: the template's end of turn if it is the model's end of text, else the latter.

    A base model has a chat template whose end token it never saw (Qwen2.5: <|im_end|>), and LoRA does not train the
    embeddings. Such a model learns to end with its own end of text.
    """
    end = turn_end_id(tokenizer)
    return end if tokenizer.eos_token_id in (None, end) else tokenizer.eos_token_id


def turn_end_id(tokenizer: Any) -> int:
    """The token with which the chat template ends an assistant's turn; without one, the end of text."""
    end = _turn_end(tokenizer, _template(tokenizer))
    return tokenizer.eos_token_id if end is None else end


@lru_cache(maxsize=8)
def _turn_end(tokenizer: Any, template: str) -> int | None:
    """The first control token after the answer: of what two conversations share that differ in the answer only."""
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("b", "cc")]
    ids = [render(tokenizer, fit_messages(tokenizer, chat)) for chat in chats]
    tail = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*map(reversed, ids), strict=False))]
    known = {*tokenizer.all_special_ids, *control_tokens(tokenizer).values()}
    return next((i for i in reversed(tail) if i in known), None)


def settle_end(tokenizer: Any, ends: int | list[int] | None) -> None:
    """Make the end of turn the tokenizer's end of text if the model stops there.

    Some chat models name another token in their tokenizer (Llama 3: <|end_of_text|>) and end turns with one that only
    their generation settings list.

    Args:
        tokenizer: it is changed.
        ends: `eos_token_id` of the model's generation settings.
    """
    end = turn_end_id(tokenizer)
    if end != tokenizer.eos_token_id and end in (ends if isinstance(ends, list) else [ends]):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
