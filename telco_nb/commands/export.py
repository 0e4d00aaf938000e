"""Exports a trained configuration for use outside of the study: `python -m telco_nb export CONFIG FOLDER --to hf`.

Every folder holds a model card (README.md), a description of the base model and the checksums of all files. It names no
path of this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from telco_nb import ROOT
from telco_nb.commands import model_card
from telco_nb.commands.common import CommandError, NewFolder, Profile, Replace, errors_as_exit_codes
from telco_nb.commands.eval_results import write_eval_results
from telco_nb.commands.export_folder import refuse_folder, whole_folder
from telco_nb.commands.trained import Config, Trained, find_trained, load_base, load_deployed, model_errors
from telco_nb.engine.runner import UnfitError
from telco_nb.report.files import READS
from telco_nb.study.params import given_path
from telco_nb.study.record import BASE_FILE
from telco_nb.study.seal import require_unchanged

if TYPE_CHECKING:
    import torch

Target = Literal["hf", "merged", "gguf", "ollama", "vllm"]
DTypeName = Literal["auto", "float32", "bfloat16"]
CONVERTER = "convert_hf_to_gguf.py"
OUTTYPES = {"auto": "auto", "float32": "f32", "bfloat16": "bf16"}  # the converter's names; its auto takes 16 bits
CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"  # a message as most chat templates write it
CHATML_OLLAMA = (
    "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
)


def export(
    trained: Trained,
    folder: Path,
    to: Target,
    dtype: DTypeName = "auto",
    converter: Path | None = None,
    replace: bool = False,
) -> list[Path]:
    """Write a trained configuration into a folder.

    Args:
        trained: the configuration.
        folder: where to; it must not exist, or be empty.
        to: hf (adapter and base model), merged (one model), gguf, ollama or vllm (merged, with what these need).
        dtype: number format of the weights; auto is that in which the base model is stored.
        converter: llama.cpp's converter, for gguf; None: the one on PATH.
        replace: replace an earlier export.

    Returns:
        The files, in order.

    Raises:
        CommandError: the folder is in use, the converter is missing, or the base model has changed.
        UnfitError: the base model cannot be loaded, or the converter fails.
    """
    folder = given_path(folder, "FOLDER")
    refuse_folder(folder, BASE_FILE, replace)  # before the work
    require_unchanged(trained.root, *READS)  # for the model card
    program = converter_program(converter) if to == "gguf" else None
    wanted = weights_dtype(trained, dtype)
    with whole_folder(folder, BASE_FILE, replace) as temporary:
        if to == "hf":
            write_adapter(trained, temporary, wanted)
        elif program is not None:
            write_gguf(trained, temporary, wanted, program, OUTTYPES[dtype])
        else:
            write_merged(trained, temporary, wanted)
        if to == "ollama":
            (temporary / "Modelfile").write_text(modelfile(trained, temporary), encoding="utf-8")
        elif to == "vllm":
            (temporary / "vllm.txt").write_text(model_card.vllm_line(trained) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(model_card.render_card(trained, to), encoding="utf-8")
        write_eval_results(trained, temporary)
        if trained.base["license"] == "apache-2.0":
            shutil.copyfile(ROOT / "LICENSE", temporary / "LICENSE")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def weights_dtype(trained: Trained, dtype: DTypeName) -> torch.dtype:
    """The number format that `dtype` names; auto is that in which the base model is stored."""
    import torch
    from transformers import AutoConfig

    from telco_nb.lora.base_model import resolve_model

    if dtype != "auto":
        return getattr(torch, dtype)
    with model_errors():
        source = resolve_model(trained.values["base_model"])
        revision = trained.values.get("base_model_revision") or "main"
        return AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision).dtype or torch.float32


# ---------------------------------------------------------------- the kinds of export


def write_adapter(trained: Trained, folder: Path, dtype: torch.dtype) -> None:
    """The adapter as 03_train saved it, and the base model in `base`."""
    shutil.copytree(trained.adapter, folder, dirs_exist_ok=True)
    model, tokenizer = load_base(trained)
    _save_model(model.to(dtype), tokenizer, folder / "base")


def write_merged(trained: Trained, folder: Path, dtype: torch.dtype) -> None:
    """A whole transformers model: the adapter merged into the base weights."""
    _save_model(*load_deployed(trained, dtype), folder)
    shutil.copyfile(trained.adapter / BASE_FILE, folder / BASE_FILE)


def _save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    from telco_nb.lora.adapter import generation_config

    model.generation_config = generation_config(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def converter_program(path: Path | None) -> list[str]:
    """The command that starts llama.cpp's converter: the one on PATH by itself, a given file with this Python.

    Raises CommandError if it is not there; the message says where it comes from.
    """
    found = shutil.which(CONVERTER)
    if path is None and found:
        return [found]
    if path is not None and path.is_file():
        return [sys.executable, str(path.resolve())]
    raise CommandError(
        f"gguf needs llama.cpp's converter, and there is no {path or f'{CONVERTER} on PATH'}. Get it with `git clone "
        f"https://github.com/ggml-org/llama.cpp`, then add --converter llama.cpp/{CONVERTER}."
    )


def write_gguf(trained: Trained, folder: Path, dtype: torch.dtype, program: list[str], outtype: str) -> None:
    """One GGUF file, made from the merged model. Raises UnfitError if the converter fails."""
    merged = folder / trained.config  # the converter writes this name into the file
    write_merged(trained, merged, dtype)
    options = [trained.config, "--outfile", f"{trained.config}.gguf", "--outtype", outtype]
    done = subprocess.run([*program, *options], cwd=folder, capture_output=True, text=True)
    if done.returncode or not (folder / f"{trained.config}.gguf").is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise UnfitError(
            f"{CONVERTER} failed (exit code {done.returncode}): {last[0]}. If it misses a package, install it with pip."
        )
    os.replace(merged / BASE_FILE, folder / BASE_FILE)
    shutil.rmtree(merged)


def modelfile(trained: Trained, folder: Path) -> str:
    """Ollama's Modelfile for the merged model in `folder`: system prompt, chat template, greedy decoding, limits."""
    from transformers import AutoTokenizer

    from telco_nb.lora.chat_template import end_token_id

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    lines = ["FROM ."]
    if _is_chatml(tokenizer):  # else Ollama must know the template
        lines.append(f'TEMPLATE """{CHATML_OLLAMA}"""')
    lines += [
        f'SYSTEM """{trained.base["system_prompt"]}"""',
        f'PARAMETER stop "{tokenizer.decode([end_token_id(tokenizer)])}"',
        f"PARAMETER temperature {trained.values['answer_temperature']:g}",
        f"PARAMETER num_predict {trained.values['answer_max_tokens']}",
    ]
    return "\n".join(lines) + "\n"


def _is_chatml(tokenizer: Any) -> bool:
    """Whether the chat template writes each message as `CHATML`."""
    probe = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    expected = "".join(CHATML.format(**message) for message in probe) + "<|im_start|>assistant\n"
    return tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True) == expected


EPILOG = """
**Examples**

- `python -m telco_nb export c04 c04-adapter --to hf`: the adapter with its base model, for peft
- `python -m telco_nb export c04 c04-gguf --to gguf --converter llama.cpp/convert_hf_to_gguf.py`: for llama.cpp
- `python -m telco_nb export c04 c04-ollama --to ollama`: then, in that folder, `ollama create c04 -f Modelfile`
"""


def main(
    config: Config,
    folder: NewFolder,
    to: Annotated[Target, typer.Option(help="For what.")],
    profile: Profile = "laptop",
    dtype: Annotated[DTypeName, typer.Option(help="Number format; auto: as the base model is stored.")] = "auto",
    converter: Annotated[Path | None, typer.Option(metavar="FILE", help=f"llama.cpp's {CONVERTER}.")] = None,
    replace: Replace = False,
) -> None:
    """Export a trained configuration with a model card: for peft, transformers, llama.cpp, Ollama or vLLM."""
    with errors_as_exit_codes("export"):
        for path in export(find_trained(profile, config), folder, to, dtype, converter, replace):
            print(f"{folder / path.relative_to(given_path(folder, 'FOLDER'))}: {path.stat().st_size:,} bytes")
