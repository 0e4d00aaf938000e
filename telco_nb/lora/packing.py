"""Conversations as token ids with labels, packed into rows without padding.

A row holds whole conversations one after another. Position ids restart at the first token of each.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch

from telco_nb.lora.chat_template import Rendered, end_token_id, fit_messages, render_all, turn_end_id
from telco_nb.lora.errors import PreflightError

IGNORE_INDEX = -100  # label of a token that is not learned, as in transformers
RETRY_ROWS = 20  # rows that must fit before larger micro-batches are tried again


@dataclass(frozen=True)
class Example:
    """One conversation as token ids; `labels` are IGNORE_INDEX except at the tokens that are learned."""

    conversation_id: str
    input_ids: list[int]
    labels: list[int]

    @property
    def n_supervised(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


def encode_conversation(
    tokenizer: Any, messages: list[dict[str, str]], conversation_id: str, max_length: int, assistant_only: bool = True
) -> Example:
    """One conversation, as `encode_conversations` encodes it."""
    return encode_conversations(tokenizer, [(conversation_id, messages)], max_length, assistant_only)[0]


def encode_conversations(
    tokenizer: Any,
    conversations: Sequence[tuple[str, Sequence[dict[str, str]]]],
    max_length: int,
    assistant_only: bool = True,
) -> list[Example]:
    """Tokenise conversations with the model's chat template and label the assistant's text and its end tokens.

    Args:
        tokenizer: of the base model.
        conversations: of each, an id for the example and for error messages, and dicts with "role" and "content".
        max_length: tokens, at most. A longer conversation is refused, because a cut answer has no end.
        assistant_only: False labels every token but the first.

    Raises:
        PreflightError: a conversation is too long, the template rewrites earlier turns, or the tokenizer does not
            reproduce the text.
    """
    chats = [fit_messages(tokenizer, list(messages)) for _, messages in conversations]
    answers = [[i for i, message in enumerate(chat) if message["role"] == "assistant"] for chat in chats]
    heads = [(chat[:i], True) for chat, found in zip(chats, answers, strict=True) for i in found]
    rendered = render_all(tokenizer, [(chat, False) for chat in chats] + heads)
    prefixes, made = iter(rendered[len(chats) :]), []
    for (name, _), found, whole in zip(conversations, answers, rendered, strict=False):
        _check_round_trip(tokenizer, whole, name)
        labels = _answer_labels(tokenizer, whole.ids, [next(prefixes).ids for _ in found], name)
        if len(whole.ids) > max_length:
            reason = f"{len(whole.ids)} tokens, more than max_length {max_length}. Raise it."
            raise PreflightError(f"{name} has {reason}")
        made.append(Example(name, whole.ids, labels if assistant_only else [IGNORE_INDEX, *whole.ids[1:]]))
    return made


def examples_table(examples: Sequence[Example]) -> pd.DataFrame:
    """Examples as a table with columns conversation_id, input_ids and labels, the latter two as int32 arrays."""
    rows = [(e.conversation_id, np.array(e.input_ids, "int32"), np.array(e.labels, "int32")) for e in examples]
    return pd.DataFrame(rows, columns=["conversation_id", "input_ids", "labels"])


def examples_of(table: pd.DataFrame) -> list[Example]:
    """The examples of an `examples_table`."""
    columns = (table["conversation_id"], table["input_ids"], table["labels"])
    return [Example(name, ids.tolist(), labels.tolist()) for name, ids, labels in zip(*columns, strict=True)]


def _answer_labels(tokenizer: Any, ids: list[int], prefixes: list[list[int]], name: str) -> list[int]:
    """Labels of the answers behind these prefixes of a conversation. In `ids` each answer's end becomes the end token.

    Raises PreflightError if an answer cannot be found exactly.
    """
    labels = [IGNORE_INDEX] * len(ids)
    turn_end, end = turn_end_id(tokenizer), end_token_id(tokenizer)
    ends: list[int] = []
    for prefix in prefixes:
        if ids[: len(prefix)] != prefix:
            reason = "the chat template rewrites earlier turns, so answers cannot be labelled exactly."
            raise PreflightError(f"{name}: {reason} Use another base_model.")
        if turn_end not in ids[len(prefix) :]:
            reason = "the chat template ends no turn with a token, so the model could not learn to stop."
            raise PreflightError(f"{name}: {reason} Use another base_model.")
        start, stop = len(prefix), ids.index(turn_end, len(prefix)) + 1
        ends.append(stop - 1)
        labels[start:stop] = ids[start:stop]
    for i in ends:  # after all prefixes were compared
        ids[i] = labels[i] = end
    return labels


def _check_round_trip(tokenizer: Any, whole: Rendered, conversation_id: str) -> None:
    text = whole.text
    if (decoded := tokenizer.decode(whole.ids)) != text:
        i = next((i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), len(decoded))
        raise PreflightError(
            f"{conversation_id}: the tokenizer turns {text[i : i + 40]!r} into {decoded[i : i + 40]!r}, so the model "
            "would not read what was written. Use another base_model, or remove such characters from the data."
        )


def example_html(tokenizer: Any, example: Example) -> str:
    """The conversation as the model sees it, as escaped HTML with labelled tokens in bold."""
    parts = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        text = html.escape(tokenizer.decode([token])).replace("\n", "<br>")
        parts.append(f"<b>{text}</b>" if label != IGNORE_INDEX else text)
    return f'<div class="mathjax_ignore" style="font-family:monospace">{"".join(parts)}</div>'


def pack_rows(examples: list[Example], batch_tokens: int, seed: int) -> list[list[int]]:
    """Best-fit decreasing: rows of example indices, the longest first into the fullest row with enough room.

    The result depends on the lengths and the seed only; a shuffle comes first, so that examples of equal length are not
    packed in their original order. A row holds at most `batch_tokens` tokens, or one example that is longer.
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


def collate(examples: list[Example]) -> dict[str, Any]:
    """Conversations as one packed row, with all that the step would otherwise have to ask a GPU for.

    Returns:
        int64 tensors of shape (1, T): "input_ids", "position_ids" that restart with each conversation, "labels", and
        "shift_labels": each label at the position that predicts it, so a conversation's last token predicts nothing.
        Tensors of one dimension: "kept", int64, the positions with a label in shift_labels, and "bounds", int32, where
        each conversation starts and the last one ends. Lists, one number a conversation, which stay on the host:
        "segments", its tokens, and "supervised", its labelled positions.
    """
    segments = [len(e.input_ids) for e in examples]
    bounds = np.array([0, *accumulate(segments)])
    ids = np.fromiter(chain.from_iterable(e.input_ids for e in examples), np.int64)
    labels = np.fromiter(chain.from_iterable(e.labels for e in examples), np.int64)
    shifted = np.append(labels[1:], IGNORE_INDEX)
    shifted[bounds[1:] - 1] = IGNORE_INDEX
    kept = shifted != IGNORE_INDEX
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(np.arange(len(ids)) - np.repeat(bounds[:-1], segments))[None],
        "shift_labels": torch.from_numpy(shifted)[None],
        # The Trainer counts supervised tokens (in shift_labels) only for batches that also hold "labels".
        "labels": torch.from_numpy(labels)[None],
        "kept": torch.from_numpy(np.flatnonzero(kept)),
        "bounds": torch.from_numpy(bounds.astype(np.int32)),
        "segments": segments,
        "supervised": np.add.reduceat(kept, bounds[:-1], dtype=int).tolist(),
    }


def to_device(row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A row of `collate` with its tensors on a device."""
    return {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in row.items()}


class PackedRows(torch.utils.data.Dataset):
    """Packed rows as a dataset of `collate`'s tensors. One row is one optimiser step.

    A row is computed in micro-batches. They get smaller when memory runs out, and larger again when rows have fitted;
    `shrunk` lists the sizes that were too large, `fitted` counts the rows since the last change. `recorded`,
    `graph_fault`, `repeats` and `peak_bytes` tell how a training computes its rows (`trainer`). `share` is (rank,
    processes): with several processes each computes its own conversations of every row. `tokens` and `supervised`
    count the tokens and the labelled tokens of each row.

    Args:
        examples: the training conversations.
        batch_tokens: tokens per row, at most.
        seed: of the packing.
        micro_batch_tokens: tokens that are computed at once, at most; None means `batch_tokens`.
    """

    def __init__(self, examples: list[Example], batch_tokens: int, seed: int, micro_batch_tokens: int | None = None):
        self.rows = [[examples[i] for i in row] for row in pack_rows(examples, batch_tokens, seed)]
        self.tokens = [sum(len(e.input_ids) for e in row) for row in self.rows]
        self.supervised = [sum(e.n_supervised for e in row) for row in self.rows]
        self.micro_batch_tokens = self.most_at_once = micro_batch_tokens or batch_tokens
        self.shrunk: list[int] = []
        self.fitted = 0
        self.forget_training()
        self.share = (0, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def forget_training(self) -> None:
        """As before a training: nothing is known of how its rows are computed. How they are cut stays."""
        self.recorded: bool | None = None  # whether their step is a recording on a GPU (`step_graph`)
        self.graph_fault: str | None = None  # why there is none
        self.repeats = not self.shrunk  # whether the same training again would give the same bits
        self.peak_bytes: int | None = None  # the most memory of the GPU that it has held

    @property
    def largest(self) -> int:
        """Tokens of this process's largest share of a row."""
        return max(sum(len(e.input_ids) for e in share_of_rank(row, *self.share)) for row in self.rows)

    def halve(self, size: int, longest: int) -> None:
        """Compute half of `size` tokens at once, which were too many, but at least the `longest` conversation."""
        self.shrunk.append(size)
        self.micro_batch_tokens, self.fitted = max(longest, size // 2), 0

    def count_fitted(self) -> None:
        """A row has fitted. After enough of them twice as many tokens are computed at once, as far as wanted at first.

        Enough are RETRY_ROWS, and twice as many each further time that memory has run out: if that was no accident,
        tries to grow get rare.
        """
        self.fitted += 1
        enough = RETRY_ROWS * 2 ** (len(self.shrunk) - 1) if self.shrunk else 0
        if self.micro_batch_tokens < self.most_at_once and self.fitted >= enough:
            self.micro_batch_tokens, self.fitted = min(2 * self.micro_batch_tokens, self.most_at_once), 0

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return collate(share_of_rank(self.rows[index], *self.share))


def fingerprint(rows: list[list[Example]]) -> str:
    """sha256 of the tokens and labels of rows, in order."""
    content = [[(e.input_ids, e.labels) for e in row] for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def share_of_rank(row: list[Example], rank: int, processes: int) -> list[Example]:
    """The conversations of a row that one process computes: the longest first, each to the process with fewest tokens.

    A process without a conversation gets the shortest one without labels. It adds nothing to the gradient, but every
    process must take part in each exchange of gradients.
    """
    tokens, owners = [0] * processes, {}
    for i in sorted(range(len(row)), key=lambda i: -len(row[i].input_ids)):
        owners[i] = tokens.index(min(tokens))
        tokens[owners[i]] += len(row[i].input_ids)
    shortest = min(row, key=lambda example: len(example.input_ids))
    unlabelled = replace(shortest, labels=[IGNORE_INDEX] * len(shortest.labels))
    return [example for i, example in enumerate(row) if owners[i] == rank] or [unlabelled]


def micro_batches(row: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """A row cut between conversations into parts of at most `tokens` tokens, or of one conversation that is longer."""
    cuts, held = [0], 0
    for i, length in enumerate(row["segments"]):
        if held and held + length > tokens:
            cuts.append(i)
            held = 0
        held += length
    return [_conversations(row, first, stop) for first, stop in pairwise([*cuts, len(row["segments"])])]


def _conversations(row: dict[str, Any], first: int, stop: int) -> dict[str, Any]:
    """The conversations `first` to `stop` of a row. Its lists name the places, so that no GPU is asked for them."""
    start, end = sum(row["segments"][:first]), sum(row["segments"][:stop])
    labelled, last = sum(row["supervised"][:first]), sum(row["supervised"][:stop])
    part = {name: row[name][:, start:end] for name in ("input_ids", "position_ids", "shift_labels", "labels")}
    return part | {
        "kept": row["kept"][labelled:last] - start,
        "bounds": row["bounds"][first : stop + 1] - start,
        "segments": row["segments"][first:stop],
        "supervised": row["supervised"][first:stop],
    }


def only_row(features: list[dict[str, Any]]) -> dict[str, Any]:
    """Data collator of the Trainer: a batch is one row, which is packed already."""
    (row,) = features
    return row
