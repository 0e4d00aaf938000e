"""Conversations that are read piece by piece have the tokens of reading each as a whole, whatever the tokenizer."""

import random

import pytest
from tiny_chat import KINDS, tiny_tokenizer
from tokenizers import normalizers

from telco_nb.lora import chat_template
from telco_nb.lora.chat_template import fit_messages, render_all

WORDS = ["Restart", "the", "phone.", "5€", "naïve", "🙂", "\n\n", " ", "\t", "I'm", "1234567", "<|", "|>", "e\u0301"]


def chats(tokenizer, count=60):
    """Random conversations, whole and up to the head of each answer."""
    rng, made = random.Random(1), []
    for _ in range(count):
        messages = []
        for _ in range(rng.randint(1, 3)):
            for role in ("user", "assistant"):
                messages.append({"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))})
        chat = fit_messages(tokenizer, messages)
        made += [(chat, False)] + [(chat[:i], True) for i, m in enumerate(chat) if m["role"] == "assistant"]
    return made


def as_a_whole(tokenizer, asked):
    return [render_all(tokenizer, [one])[0].ids for one in asked]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_wholes_have_the_same_tokens(kind):
    tokenizer = tiny_tokenizer(kind)
    asked = chats(tokenizer)
    assert [r.ids for r in render_all(tokenizer, asked)] == as_a_whole(tokenizer, asked)


def test_a_tokenizer_that_puts_a_space_in_front_of_every_piece_is_read_as_a_whole(monkeypatch):
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    asked = chats(tokenizer)
    assert [r.ids for r in render_all(tokenizer, asked)] == as_a_whole(tokenizer, asked)


def test_a_piece_is_read_once_however_many_texts_hold_it(monkeypatch):
    tokenizer, read = tiny_tokenizer("chatml"), []
    core = tokenizer.backend_tokenizer

    class Counting:
        def encode_batch_fast(self, texts, **options):
            read.extend(texts)
            return core.encode_batch_fast(texts, **options)

    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", property(lambda _: Counting()))
    asked = chats(tokenizer)
    render_all(tokenizer, asked)
    assert len(read) == len(set(read)) < 6 * len(asked)


def test_few_texts_are_read_as_a_whole(monkeypatch):
    tokenizer = tiny_tokenizer("chatml")
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", property(lambda _: object()))
    assert len(render_all(tokenizer, chats(tokenizer, 2)[: chat_template.COMPARED])) > 0
