"""Conversations as token ids with labels, packed into rows without padding.

A row holds whole conversations behind each other; position ids that restart tell them apart.
"""

from __future__ import annotations

import hashlib
import html
import json
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from telco_nb.lora.base_model import PreflightError, chat_messages, end_token_id, turn_end_id

IGNORE_INDEX = -100  # the label of a token that is not learned, as in transformers


# ---------------------------------------------------------------- conversations to token ids


@dataclass(frozen=True)
class Example:
    """One conversation as token ids; `labels` hold IGNORED except at the tokens of the assistant's turns."""

    conversation_id: str
    input_ids: list[int]
    labels: list[int]

    @property
    def n_supervised(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


def encode_conversation(
    tokenizer: Any, messages: list[dict[str, str]], conversation_id: str, max_length: int, assistant_only: bool = True
) -> Example:
    """Tokenise a conversation with the model's chat template; label the assistant's text and its end token.

    With `assistant_only` False every token but the first is labelled.

    Raises PreflightError if the template does not extend turn by turn or its text does not survive the tokenizer, or
    the conversation exceeds `max_length` tokens (cutting it would leave answers without an end).
    """
    chat = chat_messages(messages)
    ids = _render(tokenizer, chat)
    _check_round_trip(tokenizer, chat, ids, conversation_id)
    labels = [IGNORE_INDEX] * len(ids)
    turn_end, end = turn_end_id(tokenizer), end_token_id(tokenizer)
    ends: list[int] = []
    for position, message in enumerate(chat):
        if message["role"] == "assistant":
            start = len(_prefix(tokenizer, chat[:position], ids, conversation_id, generation=True))
            stop = ids.index(turn_end, start) + 1
            ends.append(stop - 1)
            labels[start:stop] = ids[start:stop]
    for place in ends:  # after the template's prefixes were compared
        ids[place] = labels[place] = end
    if not assistant_only:
        labels = [IGNORE_INDEX, *ids[1:]]
    if len(ids) > max_length:
        raise PreflightError(f"{conversation_id} has {len(ids)} tokens, more than max_length {max_length}. Raise it.")
    return Example(conversation_id, ids, labels)


def _render(tokenizer: Any, chat: list[dict[str, str]], generation: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=generation, return_dict=False)


def _prefix(tokenizer: Any, chat: list[dict[str, str]], whole: list[int], name: str, generation: bool) -> list[int]:
    prefix = _render(tokenizer, chat, generation)
    if whole[: len(prefix)] != prefix:
        raise PreflightError(
            f"{name}: the chat template rewrites earlier turns, so answers cannot be labelled exactly."
        )
    return prefix


def _check_round_trip(tokenizer: Any, chat: list[dict[str, str]], ids: list[int], name: str) -> None:
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    if (back := tokenizer.decode(ids)) != text:
        place = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
        raise PreflightError(
            f"{name}: the tokenizer turns {text[place : place + 40]!r} into {back[place : place + 40]!r}, so the model "
            "would not read what was written. Use another base_model, or keep such characters out of the data."
        )


def example_html(tokenizer: Any, example: Example) -> str:
    """The conversation as the model sees it, labelled tokens in bold; every text is escaped."""
    parts = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        text = html.escape(tokenizer.decode([token])).replace("\n", "<br>")
        parts.append(f"<b>{text}</b>" if label != IGNORE_INDEX else text)
    return f'<div style="font-family:monospace">{"".join(parts)}</div>'


# ---------------------------------------------------------------- packing


def pack_rows(examples: list[Example], batch_tokens: int, seed: int) -> list[list[int]]:
    """Rows of example indices with at most `batch_tokens` tokens each: longest first into the fullest row that fits.

    The order is shuffled first, so that equal lengths do not meet their neighbours; the result depends on nothing but
    the lengths and the seed. An example longer than `batch_tokens` gets a row of its own.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    lengths = {int(i): len(examples[i].input_ids) for i in order}
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(lengths, key=lambda i: -lengths[i]):
        fitting = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if fitting:
            row = min(fitting, key=lambda r: room[r])
            rows[row].append(i)
            room[row] -= lengths[i]
        else:
            rows.append([i])
            room.append(batch_tokens - lengths[i])
    return [rows[r] for r in np.random.default_rng(seed + 1).permutation(len(rows))]


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """One packed row, shape (1, T). Position ids restart with each conversation; labels are shifted to where they are
    predicted, so the last token of a conversation predicts nothing of the next one."""
    shifted = [label for e in examples for label in (*e.labels[1:], IGNORE_INDEX)]
    return {
        "input_ids": torch.tensor([[t for e in examples for t in e.input_ids]]),
        "position_ids": torch.tensor([[p for e in examples for p in range(len(e.input_ids))]]),
        "shift_labels": torch.tensor([shifted]),
        # The Trainer counts supervised tokens (in shift_labels) only for batches that also hold "labels".
        "labels": torch.tensor([[label for e in examples for label in e.labels]]),
    }


class PackedRows(torch.utils.data.Dataset):
    """Packed rows as a dataset: one row is one optimiser step, computed in parts of at most `micro_batch_tokens`.

    The parts get smaller when memory runs out; `shrunk` then holds the sizes that were too large. `share` says which
    of how many processes this one is: each gets its own conversations of every row.
    """

    def __init__(self, examples: list[Example], batch_tokens: int, seed: int, micro_batch_tokens: int | None = None):
        self.rows = [[examples[i] for i in row] for row in pack_rows(examples, batch_tokens, seed)]
        self.tokens = [sum(len(e.input_ids) for e in row) for row in self.rows]
        self.supervised = [sum(e.n_supervised for e in row) for row in self.rows]
        self.micro_batch_tokens = micro_batch_tokens or batch_tokens
        self.shrunk: list[int] = []
        self.share = (0, 1)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def largest(self) -> int:
        """Tokens of this process's largest share of a row."""
        return max(sum(len(e.input_ids) for e in share_of_rank(row, *self.share)) for row in self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokens and labels of all rows, in order."""
        rows = [[(e.input_ids, e.labels) for e in row] for row in self.rows]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return collate(share_of_rank(self.rows[index], *self.share))


def share_of_rank(row: list[Example], process: int, processes: int) -> list[Example]:
    """The conversations of a row that one process computes: the longest first, each to whoever has fewest tokens.

    Where a row has too few, a process gets the shortest without its labels: every process must take part in each
    exchange of gradients, and this adds nothing to them.
    """
    tokens, owners = [0] * processes, {}
    for i in sorted(range(len(row)), key=lambda i: -len(row[i].input_ids)):
        owners[i] = tokens.index(min(tokens))
        tokens[owners[i]] += len(row[i].input_ids)
    shortest = min(row, key=lambda example: len(example.input_ids))
    unlabelled = replace(shortest, labels=[IGNORE_INDEX] * len(shortest.labels))
    return [example for i, example in enumerate(row) if owners[i] == process] or [unlabelled]


def micro_batches(row: dict[str, torch.Tensor], tokens: int) -> list[dict[str, torch.Tensor]]:
    """A row cut between conversations into parts of at most `tokens` tokens, or of one conversation that is longer."""
    cuts, stop = [0], 0
    for length in segment_lengths(row["position_ids"]):
        if stop > cuts[-1] and stop + length - cuts[-1] > tokens:
            cuts.append(stop)
        stop += length
    return [{n: t[:, a:b] for n, t in row.items()} for a, b in pairwise([*cuts, stop])]


def segment_lengths(position_ids: torch.Tensor) -> list[int]:
    """Lengths of the conversations in a row, from position ids (1, T) that restart at each one."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    return np.diff([*starts, position_ids.shape[1]]).tolist()


def only_row(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Data collator of the Trainer: a batch is one packed row already."""
    (row,) = features
    return row
