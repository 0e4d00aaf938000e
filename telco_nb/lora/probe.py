"""What a study's trainings need, before one starts: memory, disk, arithmetic, and on a GPU a timed probe.

`python -m telco_nb.lora.probe` reads a request as JSON from stdin and prints the answer as JSON: the runner, which
imports no torch, asks in a process of its own. The probe trains and answers with random weights in the model's shape,
because speed does not depend on their values, and downloads no weights.

On an H100 in the shape of Qwen2.5-3B the plan with it took 117 s.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch

from telco_nb.lora import base_model, decoding, device, energy, packing, preflight, step, step_graph
from telco_nb.lora.errors import ModelError, PreflightError

PROBE_S = 20.0  # of each measurement: long enough for sampled power as well
ANSWER_TOKENS = 24  # new tokens of each answer of the probe
OPTIMISER_SHARE = 0.75  # of the bytes a trained weight takes: value and two moments, without the gradient, are saved
SEED = 20260605


def answer(request: dict[str, Any], seconds: float = PROBE_S) -> dict[str, Any]:
    """The needs of a study.

    Args:
        request: "base_model", "revision"; "conversations": messages of typical ones; "trainings": parameters of 03,
            one dict each; "answering": parameters of 04; "timed": whether to probe the device.
        seconds: of each measurement.

    Returns:
        "tokens" and "supervised": of a conversation, on average. "download_bytes": 0 for a folder. "trainings": for
        each what `_needs` finds. "card" and "free_bytes": of the device, None if it is not timed. "faults": why the
        study cannot run on it. If timed and without faults, also what `_speeds` finds.

    Raises:
        ModelError: the model's configuration or tokenizer cannot be read.
    """
    if request["timed"]:
        device.use_device(request["trainings"][0]["device"])
    shell = base_model.model_shell(request["base_model"], request["revision"])
    tokenizer = base_model.load_tokenizer(request["base_model"], request["revision"])
    max_length = max(values["max_length"] for values in request["trainings"])
    chats = [(str(i), messages) for i, messages in enumerate(request["conversations"])]
    examples = packing.encode_conversations(tokenizer, chats, max_length)
    needs = [_needs(shell, values, examples) for values in request["trainings"]]
    found = {
        "tokens": sum(len(e.input_ids) for e in examples) / len(examples),
        "supervised": sum(e.n_supervised for e in examples) / len(examples),
        "download_bytes": base_model.bytes_to_download(request["base_model"], shell),
        "trainings": needs, "card": None, "free_bytes": None, "faults": [],
    }  # fmt: skip
    if request["timed"]:
        free = device.free_memory()  # once: what a study's training, alone in its process, finds as well
        sizes, faults = _sizes(shell, request, needs, free)
        found |= {"card": _card(), "free_bytes": free, "faults": faults}
        found |= {} if faults else _speeds(shell.config, request, needs, sizes, examples, seconds)
    return found


def _needs(shell: Any, values: dict[str, Any], examples: list[packing.Example]) -> dict[str, Any]:
    """Of one training: "memory" by part in bytes, "adapter_weights", "adapter_bytes" and "checkpoint_bytes" on disk,
    and "flops_per_token"."""
    dtype = torch.float32 if values["dtype"] == "float32" else torch.bfloat16
    targets = step.resolve_targets(shell, values["target_modules"])
    memory = base_model.memory_estimate(
        shell, dtype, values["quantization"], targets, values["rank"], values["batch_tokens"],
        values["lora_dropout"] > 0, values["gradient_checkpointing"],
        values["fused_step"] and not values["dora"] and values["bias"] == "none",
    )  # fmt: skip
    segments = [len(e.input_ids) for e in examples]
    weights = memory["adapters"] / 16
    flops = step.step_flops(shell, sum(segments), sum(e.n_supervised for e in examples), segments)
    return {
        "memory": memory,
        "adapter_weights": weights,
        "adapter_bytes": 4 * weights,
        "checkpoint_bytes": OPTIMISER_SHARE * memory["adapters"],
        "flops_per_token": flops / sum(segments) + 6 * weights,
    }


def _sizes(
    shell: Any, request: dict[str, Any], needs: list[dict[str, Any]], free: float
) -> tuple[list[int], list[str]]:
    """Tokens that each training computes at once with `free` bytes, and what 03 and 04 would refuse, once each."""
    sizes, faults = [], {}
    for values, need in zip(request["trainings"], needs, strict=True):
        row = (values["batch_tokens"], values["max_length"])
        try:
            sizes.append(values["micro_batch_tokens"] or preflight.fitting_tokens(need["memory"], *row, free))
            preflight.check_merging(shell, free)
        except PreflightError as error:
            faults[str(error)] = None
    return sizes, list(faults)


def _card() -> str:
    return torch.cuda.get_device_name() if device.on_gpu() else "the processor"


def _speeds(
    config: Any, request: dict[str, Any], needs: list[dict[str, Any]], sizes: list[int],
    examples: list[packing.Example], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Speeds of answering, and of the trainings with the smallest and the largest adapter.

    Each is a dict with "adapter_weights", "tokens_per_second", "mean_w" and "energy_kind"; mean_w is None without a
    measured energy. Between the two trainings, time a token grows about linearly with the adapter.
    """
    order = sorted(range(len(needs)), key=lambda i: needs[i]["adapter_weights"])
    trained = []
    for i in dict.fromkeys((order[0], order[-1])):
        values = request["trainings"][i]
        timed = partial(_training_speed, config, values, sizes[i], examples, seconds)
        trained.append(device.in_fixed_order(timed)[0] | {"adapter_weights": needs[i]["adapter_weights"]})
        _free_device()
    answering, values = request["answering"], request["trainings"][0]
    work = answering_work(_random_model(config, answering["dtype"]), answering["answer_batch_size"], examples)
    return {"training_speeds": trained, "answering_speed": metered(work, seconds, values)}


def _training_speed(
    config: Any, values: dict[str, Any], micro: int, examples: list[packing.Example], seconds: float
) -> dict[str, Any]:
    _free_device()  # of a first try that could not keep a fixed order
    return metered(training_work(_random_model(config, values["dtype"]), values, micro, examples), seconds, values)


def _free_device() -> None:
    """Give back what a measurement has left: a model whose fused modules refer to themselves, and the allocator's."""
    gc.collect()
    if device.on_gpu():
        torch.cuda.empty_cache()


def _random_model(config: Any, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with device.torch_device():
        return AutoModelForCausalLM.from_config(config, dtype=device.choose_dtype(dtype)[0])


def training_work(base: Any, values: dict[str, Any], micro: int, examples: list[packing.Example]) -> Callable[[], int]:
    """A function that trains on one full row, waits for the device and returns the row's tokens."""
    from peft import LoraConfig

    lora = LoraConfig(
        r=values["rank"], lora_alpha=2 * values["rank"], lora_dropout=values["lora_dropout"], use_dora=values["dora"],
        target_modules=step.resolve_targets(base, values["target_modules"]), task_type="CAUSAL_LM",
    )  # fmt: skip
    tuned = step.attach_adapters(base, lora, values["gradient_checkpointing"])
    step.prepare_step(tuned, values["fused_step"])
    tuned.train()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.on_gpu())
    rows = packing.PackedRows(_filling(examples, values["batch_tokens"]), values["batch_tokens"], SEED, micro)
    graph = step_graph.record_step(tuned, trained, rows)[0] if values["record_step"] else None

    def work() -> int:
        row, supervised = packing.to_device(rows[0], device.torch_device()), rows.supervised[0]
        if graph:
            graph.step(row, supervised)
        for part in () if graph else packing.micro_batches(row, micro):
            (step.token_losses(tuned, part).sum() / supervised).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0).item()  # the Trainer's log waits here as well
        optimizer.step()
        optimizer.zero_grad()
        return rows.tokens[0]

    return work


def _filling(examples: list[packing.Example], tokens: int) -> list[packing.Example]:
    """Conversations, in turn and again, that have up to so many tokens in all; one at least."""
    chosen = [examples[0]]
    for example in cycle(examples[1:] + examples[:1]):
        if sum(len(e.input_ids) for e in (*chosen, example)) > tokens:
            break
        chosen.append(example)
    return chosen


def answering_work(base: Any, batch: int, examples: list[packing.Example]) -> Callable[[], int]:
    """A function that writes a few tokens to each prompt of a batch and returns their number."""
    prompts = [example.input_ids for _, example in zip(range(batch), cycle(examples), strict=False)]

    def work() -> int:
        return sum(map(len, decoding.generate(base.eval(), prompts, end=-1, max_tokens=ANSWER_TOKENS)))

    return work


def metered(work: Callable[[], int], seconds: float, values: dict[str, Any]) -> dict[str, Any]:
    """Speed and mean power of work that is repeated for `seconds`, after a warm-up."""
    watts = tuple(values[f"cpu_watts_per_core{end}"] for end in ("_low", "", "_high"))
    meter, tokens = energy.Meter(watts, values["idle_share"]), 0
    work()
    work()
    meter.start()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not tokens:
        tokens += work()
    meter.stop()
    figures, window_s = energy.energy_metrics(meter.statement("probe"), "probe"), meter.total["window_s"]
    known = figures["energy_valid"] and figures["energy_kind"] in ("measured", "allocated")
    mean_w = figures["probe_energy_wh"] * energy.JOULES_PER_WH / window_s if known else None
    return {"tokens_per_second": tokens / window_s, "mean_w": mean_w, "energy_kind": figures["energy_kind"]}


def main() -> None:
    base_model.silence_libraries()
    try:
        found = answer(json.load(sys.stdin))
    except (ModelError, PreflightError) as error:
        found = {"error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
