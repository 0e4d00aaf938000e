"""Does an adapter fit? Its options, its weights, the model and the configuration that it was trained for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from telco_nb.lora.base_model import weights_checksum
from telco_nb.lora.errors import ModelError
from telco_nb.lora.step import resolve_targets
from telco_nb.study.manifest import load_manifest
from telco_nb.study.record import BASE_FILE, read_object

# Options of peft that may differ from its defaults: those that a configuration sets, and those that say nothing about
# the weights. Any other could give them another meaning than the one that is merged here.
ALLOWED_OPTIONS = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "layers_to_transform", "target_modules",
    "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "init_lora_weights",
}  # fmt: skip


def check_adapter(model: Any, adapter: Path, config: LoraConfig, weights: dict[str, Tensor]) -> None:
    """Check that an adapter fits the model, and the configuration if the adapter lies in a finished step.

    Args:
        model: the base model.
        adapter: its folder; errors name it.
        config, weights: what the folder holds.

    Raises:
        ModelError: it does not fit, or the base weights are others; the message says in what.
    """
    _check_base(model, adapter, config)
    faults = _option_faults(adapter, config)
    faults += _configuration_faults(model, config, _trained_with(adapter)) or _weight_faults(model, config, weights)
    if faults:
        raise ModelError(f"the adapter {adapter} does not fit: {'; '.join(faults[:3])}. Train it again: --force 03.")


def _check_base(model: Any, adapter: Path, config: LoraConfig) -> None:
    """Raise ModelError if the base weights are not those on which the adapter was trained, as far as its file says.

    Weights that were quantised in training cannot be compared.
    """
    if not (adapter / BASE_FILE).is_file():
        return
    facts = read_object(adapter / BASE_FILE)
    if facts["quantization"] != "none":
        return
    found = weights_checksum(model, biases=config.bias == "none", dtype=getattr(torch, facts["dtype"]))
    if found != facts["checksum"]:
        raise ModelError(
            f"the base model {facts['name']} does not hold the weights on which the adapter {adapter} was trained: "
            f"their checksum was {facts['checksum'][:12]}, and now it is {found[:12]}. Bring those back, or train it "
            "again: --force 03."
        )


def _trained_with(adapter: Path) -> dict[str, Any]:
    """The parameters of the step in whose `artefacts` an adapter lies; empty if it lies elsewhere."""
    manifest, _ = load_manifest(adapter.parent.parent / "manifest.json")
    return manifest["parameters"] if manifest and manifest["step"] == "03_train" else {}


def _configuration_faults(model: Any, config: LoraConfig, parameters: dict[str, Any]) -> list[str]:
    """Differences between the adapter's options and the parameters of its training."""
    found = {
        "rank": config.r,
        "lora_alpha": config.lora_alpha,
        "rslora": config.use_rslora,
        "dora": config.use_dora,
        "bias": config.bias,
        "layers_to_transform": config.layers_to_transform,
        "target_modules": sorted(config.target_modules or ()),
    }
    wanted = {name: parameters.get(name, value) for name, value in found.items()}
    if "target_modules" in parameters:
        wanted["target_modules"] = sorted(resolve_targets(model, parameters["target_modules"]))
    return [
        f"{name} is {found[name]}, and the configuration says {wanted[name]}"
        for name in found
        if found[name] != wanted[name]
    ]


def _option_faults(adapter: Path, config: LoraConfig) -> list[str]:
    """Options that are neither allowed nor peft's defaults; one that this version of peft does not know is none."""
    usual = LoraConfig()
    names = {field.name for field in dataclasses.fields(config)}
    found = {name for name in names - ALLOWED_OPTIONS if getattr(config, name) != getattr(usual, name)}
    found |= {
        name for name, value in read_object(adapter / "adapter_config.json").items() if value and name not in names
    }
    if not isinstance(config.init_lora_weights, bool):  # such as pissa, whose base weights are others
        found.add("init_lora_weights")
    return [f"{', '.join(sorted(found))} is set, which is not merged here"] if found else []


def _weight_faults(model: Any, config: LoraConfig, weights: dict[str, Tensor]) -> list[str]:
    """Weights that are missing, do not belong there, have another shape, or are no finite numbers."""
    wanted = _wanted_shapes(model, config)
    found = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    if not wanted:
        return ["it adapts no layer of this model"]
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} does not belong there" for name in found if name not in wanted]
    faults += [
        f"{name} is {tuple(weight.shape)}, not {wanted[name]}"
        for name, weight in found.items()
        if tuple(weight.shape) != wanted.get(name, tuple(weight.shape))
    ]
    return faults + [f"{name} holds what is no finite number" for name, w in found.items() if not w.isfinite().all()]


def _wanted_shapes(model: Any, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight that an adapter with these options has for a model, by its name there."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and check_target_module_exists(config, name)
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        shapes[f"{name}.lora_A.weight"] = (config.r, layer.in_features)
        shapes[f"{name}.lora_B.weight"] = (layer.out_features, config.r)
        if config.use_dora:
            shapes[f"{name}.lora_magnitude_vector"] = (layer.out_features,)
    for name, weight in model.named_parameters() if layers and config.bias != "none" else ():
        layer, _, part = name.rpartition(".")
        if part == "bias" and layer in layers:
            shapes[f"{layer}.base_layer.bias"] = tuple(weight.shape)
        elif part == "bias" and config.bias == "all":
            shapes[name] = tuple(weight.shape)
    return shapes
