"""Asks a trained configuration in the terminal: `python -m telco_nb chat CONFIG`.

With `--prompt` it answers once, exactly as 04_energy lets it answer, and prints nothing else.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, NamedTuple

import pandas as pd
import typer

from telco_nb.commands.common import Profile, errors_as_exit_codes
from telco_nb.commands.model_card import held_against_bar, unfit_reasons
from telco_nb.commands.trained import Config, Trained, answer_dtype, find_trained, load_deployed
from telco_nb.hosted.keys import printable
from telco_nb.report.files import READS, read_study
from telco_nb.study.seal import require_unchanged

HELP = "/quit ends, /new starts another conversation."


class Speaker(NamedTuple):
    """A model that answers, with the name under which it does."""

    name: str
    model: Any
    tokenizer: Any


def load_speakers(trained: Trained, beside: bool) -> list[Speaker]:
    """The trained model and, with `beside`, the untuned one."""
    from telco_nb.lora.adapter import generation_config

    def load(name: str, tuned: bool) -> Speaker:
        model, tokenizer = load_deployed(trained, answer_dtype(trained), tuned)
        model.generation_config = generation_config(tokenizer)
        return Speaker(name, model, tokenizer)

    speakers = [load(trained.config, tuned=True)]
    if beside:
        speakers.append(load("untuned", tuned=False))
    return speakers


def answer(trained: Trained, speaker: Speaker, prompt: str, max_tokens: int) -> str:
    """The answer to one message, decoded as in 04_energy, of at most `max_tokens` tokens."""
    from telco_nb.lora.decoding import answer_prompts

    asked = pd.DataFrame({"prompt_id": ["prompt"], "messages": [[{"role": "user", "content": prompt}]]})
    values = trained.values
    answers = answer_prompts(
        speaker.model,
        speaker.tokenizer,
        asked,
        max_tokens,
        batch_size=1,
        temperature=values["answer_temperature"],
        seed=values["seed"],
    )
    return str(answers["answer"].iloc[0])


def stream(speaker: Speaker, messages: list[dict[str, str]], max_tokens: int, temperature: float) -> str:
    """Print the answer to a conversation word by word, and return it; it is empty if the model cannot read so much."""
    import torch
    from transformers import TextStreamer

    class SafeStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    from telco_nb.lora.chat_template import prompt_ids

    ids = torch.tensor([prompt_ids(speaker.tokenizer, messages)], device=speaker.model.device)
    start = ids.shape[1]
    if start + max_tokens > speaker.model.config.max_position_embeddings:
        print("(This conversation is too long for the model: type /new.)")
        return ""
    options = {"do_sample": True, "temperature": temperature} if temperature else {}
    written = speaker.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **options,
        max_new_tokens=max_tokens,
        streamer=SafeStreamer(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return speaker.tokenizer.decode(written[0, start:], skip_special_tokens=True).strip()


def converse(trained: Trained, speakers: list[Speaker], max_tokens: int) -> None:
    """Read lines from the terminal and answer them, until /quit or the end of the input."""
    histories: list[list[dict[str, str]]] = [[] for _ in speakers]
    while True:
        try:
            line = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/new":
            histories = [[] for _ in speakers]
        elif line:
            for speaker, history in zip(speakers, histories, strict=True):
                history.append({"role": "user", "content": line})
                print(f"{speaker.name}: ", end="", flush=True)
                text = stream(speaker, history, max_tokens, trained.values["answer_temperature"])
                history.append({"role": "assistant", "content": text})


EPILOG = """
**Examples**

- `python -m telco_nb chat c04 --beside`: talk to c04, with the untuned model's answers beside its own
- `python -m telco_nb chat c04 --prompt "My phone shows no service."`: one answer, for scripts
"""


def main(
    config: Config,
    profile: Profile = "laptop",
    beside: Annotated[bool, typer.Option("--beside", help="Show the untuned model's answers as well.")] = False,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this once, then end.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="New tokens per answer. Default: as in the study.")
    ] = None,
) -> None:
    """Talk to a trained configuration in the terminal; nothing leaves this machine."""
    with errors_as_exit_codes("chat"):
        trained = find_trained(profile, config)
        limit = max_tokens or trained.values["answer_max_tokens"]
        require_unchanged(trained.root, *READS)
        unfit = unfit_reasons(read_study(trained.root, []), held_against_bar(trained))
        if unfit:
            print(f"{config} is NOT FIT to answer customers: {'; '.join(unfit)}.", file=sys.stderr)
        speakers = load_speakers(trained, beside)
        if prompt is None:
            print(HELP)
            converse(trained, speakers, limit)
            return
        for speaker in speakers:
            text = printable(answer(trained, speaker, prompt, limit))
            print(f"{speaker.name}: {text}" if beside else text)
