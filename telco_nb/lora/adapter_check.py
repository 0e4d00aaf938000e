"""Does an adapter fit? Its options, its weights, the model and the configuration that it was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from telco_nb.lora.errors import ModelError
from telco_nb.lora.step import resolve_targets
from telco_nb.study.manifest import load_manifest

# Options of peft that change the meaning of the weights and that no configuration of a study sets.
UNKNOWN_OPTIONS = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication",
    "target_parameters", "trainable_token_indices",
)  # fmt: skip


def check_adapter(model: Any, adapter: Path, config: LoraConfig, weights: dict[str, Tensor]) -> None:
    """Check that an adapter fits the model, and the configuration if the adapter lies in a finished step.

    Args:
        model: the base model.
        adapter: its folder; errors name it.
        config, weights: what the folder holds.

    Raises:
        ModelError: it does not fit; the message says in what.
    """
    options = [name for name in UNKNOWN_OPTIONS if getattr(config, name, None)]
    faults = [f"{', '.join(options)} is set, which is not merged here"] if options else []
    faults += _configuration_faults(model, config, _trained_with(adapter)) or _weight_faults(model, config, weights)
    if faults:
        raise ModelError(f"the adapter {adapter} does not fit: {'; '.join(faults[:3])}. Train it again: --force 03.")


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


def _weight_faults(model: Any, config: LoraConfig, weights: dict[str, Tensor]) -> list[str]:
    """Layers that should have an adapter and have none, have one and should not, or have one of another shape."""
    layers = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and check_target_module_exists(config, name)
    }
    parts = {"lora_A": {}, "lora_B": {}}
    for name, weight in weights.items():
        layer, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if part in parts:
            parts[part][layer] = tuple(weight.shape)
    faults = [f"{name} has no adapter" for name in layers if name not in parts["lora_A"]]
    faults += [f"{name} is no layer to adapt here" for name in parts["lora_A"] if name not in layers]
    for name, (out_features, in_features) in layers.items():
        wanted = {"lora_A": (config.r, in_features), "lora_B": (out_features, config.r)}
        faults += [
            f"{part} of {name} is {parts[part].get(name, 'missing')}, not {shape}"
            for part, shape in wanted.items()
            if name in parts["lora_A"] and parts[part].get(name) != shape
        ]
    return faults if layers else ["it adapts no layer of this model"]
