"""Tiny random models of many architectures, and the table in README.md of what the training step does with them.

`python tests/support/architectures.py` prints the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from telco_nb.lora import base_model, decoding, kernels, preflight, step
from telco_nb.lora.errors import ModelError, PreflightError
from telco_nb.lora.packing import IGNORE_INDEX, Example

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
SHORT = {"sliding_window": 8}
WINDOW = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}


class Case(NamedTuple):
    """An architecture as transformers names it, with sizes that differ from SIZES; `why` it is refused, if it is."""

    name: str
    model_type: str
    options: Mapping[str, Any] = MappingProxyType({})
    why: str = ""
    message: str = ""  # part of the refusal


CASES = [
    Case("Llama, SmolLM2", "llama"),
    Case("Qwen2, Qwen2.5", "qwen2"),
    Case("Qwen3", "qwen3", HEADS),
    Case("Mistral without a window", "mistral", {"sliding_window": None}),
    Case("Mistral, a window that holds the conversation", "mistral", {"sliding_window": 64}),
    Case("Gemma 3 (text)", "gemma3_text", HEADS | BOTH_KINDS | {"final_logit_softcapping": 3.0}),
    Case("Phi-3", "phi3"),
    Case("OLMo 2", "olmo2"),
    Case("Granite", "granite", {"logits_scaling": 8.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3}),
    Case("SmolLM3", "smollm3", {"no_rope_layers": [1, 0]}),
    Case("GLM-4", "glm4", HEADS),
    Case("Mixtral", "mixtral", {"num_local_experts": 4}),
    Case("Qwen3-MoE", "qwen3_moe", HEADS | EXPERTS | {"num_experts": 4}),
    Case("Phi-2", "phi"),
    Case("Mistral, a shorter window", "mistral", SHORT, "the window is not computed", "looks back on 8 tokens"),
    Case("Qwen2, a shorter window", "qwen2", WINDOW, "the window is not computed", "looks back on 8 tokens"),
    Case("Gemma 2", "gemma2", HEADS, "a soft limit of the attention scores", "in a way of its own"),
    Case("gpt-oss", "gpt_oss", HEADS | {"num_local_experts": 4}, "attention sinks", "in a way of its own"),
    Case("StableLM", "stablelm", {}, "it does not hand conversation lengths on", "cannot compute this model"),
    Case("Qwen3-Next", "qwen3_next", HEADS | {"layer_types": ["linear_attention"] * 2}, "its state runs on into the "
         "next conversation", "does not compute what this model computes"),
    Case("GPT-NeoX", "gpt_neox", {}, "layers with other names", "target_modules: all means"),
]  # fmt: skip


def tiny_model(case: Case) -> Any:
    """A model with random weights, large enough that a part which is left out is seen."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **(SIZES | {"initializer_range": 0.4} | dict(case.options)))
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.3)
    return model.eval()


def two_examples() -> list[Example]:
    torch.manual_seed(2)
    ids = [torch.randint(3, 97, (n,)).tolist() for n in (9, 17)]
    return [Example(f"e{i}", tokens, [IGNORE_INDEX] * 2 + tokens[2:]) for i, tokens in enumerate(ids)]


def usable_groups(model: Any) -> list[str]:
    """The groups of target modules that every layer of the model has."""
    groups = []
    for group in step.TARGET_MODULES:
        try:
            step.resolve_targets(model, group)
            groups.append(group)
        except ModelError:
            pass
    return groups


def adapted(case: Case) -> tuple[str, Any]:
    """The model with adapters at its largest group of target modules: (kind of step, model)."""
    model = tiny_model(case)
    base_model.check_supported(case.name, model)
    groups = usable_groups(model)
    targets = step.resolve_targets(model, next((g for g in ("all", "attention", "qv", "mlp") if g in groups), "all"))
    step.prepare_step(model)
    torch.manual_seed(1)
    tuned = step.attach_adapters(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return step.prepare_step(tuned), tuned


def check_case(case: Case) -> tuple[str, preflight.StepCheck]:
    """The adapted model through the preflight: (kind of step, check)."""
    kind, tuned = adapted(case)
    return kind, preflight.check_step(tuned, two_examples())


def answers_as_transformers(case: Case) -> bool:
    """Whether greedy answers in a batch are those of transformers for each prompt alone."""
    model, prompts = tiny_model(case), [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13]]
    found = decoding.generate(model, prompts, end=-1, max_tokens=6)
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    alone = [model.generate(input_ids=torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    return found == alone


def refusal(case: Case) -> str:
    """The message with which a case is refused; empty if it is not."""
    try:
        check_case(case)
    except PreflightError as error:
        return str(error)
    return ""


def table() -> list[str]:
    """The lines of README.md's table, from what is found here."""
    lines = ["| architecture | training | `target_modules` |", "| --- | --- | --- |"]
    for case in CASES:
        message = refusal(case)
        groups = "" if message else ", ".join(usable_groups(tiny_model(case)))
        fused = kernels.fuse(tiny_model(case).requires_grad_(False))
        found = f"refused: {case.why}" if message else "exact, fused" if fused else "exact"
        lines.append(f"| {case.name} | {found} | {groups} |")
    return lines


if __name__ == "__main__":
    base_model.silence_libraries()
    print("\n".join(table()))
