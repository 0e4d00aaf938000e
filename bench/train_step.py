"""Real tokens per second of one LoRA step: ours against a padded transformers loop and against TRL's SFTTrainer.

`python bench/train_step.py [repeats]`: the same 48 ragged conversations, SmolLM2-135M, rank 16 on all linear layers.
The competitors take turns, each time in a process of its own, so that no allocator or patch of one helps another. Every
one trains the same tokens and reports the loss of the untrained adapter on all of them; these must agree. TRL runs with
its defaults and with the best CPU settings found: bfloat16 weights, one conversation a batch (so no padding), no
checkpointing, plain loss.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain

from telco_nb import DATA_DIR, ROOT
from telco_nb.corpus import gold, scenarios
from telco_nb.corpus.cards import load_cards
from telco_nb.study.params import load_study

CONVERSATIONS, WARM, SEED, RANK, LEARNING_RATE = 48, 2, 20260605, 16, 1e-4
KINDS = ("ours bf16", "ours fp32", "padded loop fp32", "padded loop bf16", "TRL default", "TRL best")


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Ragged conversations: gold ones from all over the grid."""
    rows = gold.load_gold(DATA_DIR / "conversations", shipped_grid())
    return [row["messages"] for row in rows[:: max(1, len(rows) // count)][:count]]


def shipped_grid() -> list[scenarios.Scenario]:
    """The scenarios of the shipped cards."""
    cards, contexts = load_cards(DATA_DIR / "cards"), scenarios.load_contexts(DATA_DIR / "contexts.yaml")
    return scenarios.build_scenarios(cards, contexts, load_study("laptop").base["unseen_terms"])


def load(dtype: str):
    import torch
    from peft import LoraConfig, get_peft_model

    from telco_nb.lora import base_model
    from telco_nb.lora.step import TARGET_MODULES

    base_model.silence_libraries()
    base, tokenizer = base_model.load_model(base_model.PACKAGED_MODEL, getattr(torch, dtype))
    torch.manual_seed(0)
    options = {"r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM"}
    tuned = get_peft_model(base, LoraConfig(target_modules=TARGET_MODULES["all"], **options))
    return tuned, tokenizer


def arguments(folder: str, **options) -> dict:
    """What all the Trainers have in common: one pass, no checkpoint, no report."""
    fixed = {"output_dir": folder, "num_train_epochs": 1, "learning_rate": LEARNING_RATE, "report_to": [], "seed": 0}
    return fixed | {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1000} | options


def ours(chats: list, dtype: str, batch_tokens: int = 1024) -> dict:
    from transformers import TrainingArguments

    from telco_nb.lora import packing
    from telco_nb.lora.step import prepare_step, step_flops, token_losses
    from telco_nb.lora.trainer import PackedTrainer, answer_losses

    tuned, tokenizer = load(dtype)
    prepare_step(tuned)
    examples = [packing.encode_conversation(tokenizer, chat, str(i), 1024) for i, chat in enumerate(chats)]
    losses = answer_losses(tuned, examples, batch_tokens)
    rows = packing.PackedRows(examples, batch_tokens, 0)
    lengths = [[len(e.input_ids) for e in row] for row in rows.rows]
    for i in range(2):
        token_losses(tuned.train(), rows[i]).mean().backward()
    tuned.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory() as folder:
        fixed = arguments(folder, per_device_train_batch_size=1, label_names=["labels"], remove_unused_columns=False)
        trainer = PackedTrainer(tuned, TrainingArguments(**fixed), train_dataset=rows, data_collator=packing.only_row)
        seconds = timed(trainer)
    flops = step_flops(tuned, sum(rows.tokens), sum(rows.supervised), list(chain.from_iterable(lengths)))
    return {"loss": mean(losses), "tokens": sum(rows.tokens), "seconds": seconds, "gflops": flops / seconds / 1e9}


def padded(chats: list, dtype: str, size: int = 4) -> dict:
    """The loop of a tutorial: batches padded on the right, logits at every position, transformers' own loss."""
    import torch

    from telco_nb.lora import packing

    tuned, tokenizer = load(dtype)
    examples = [packing.encode_conversation(tokenizer, chat, str(i), 1024) for i, chat in enumerate(chats)]
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def loss_of(chosen: list) -> torch.Tensor:
        width = max(len(e.input_ids) for e in chosen)
        pad = [width - len(e.input_ids) for e in chosen]
        ids = torch.tensor([e.input_ids + [0] * n for e, n in zip(chosen, pad, strict=True)])
        mask = torch.tensor([[1] * len(e.input_ids) + [0] * n for e, n in zip(chosen, pad, strict=True)])
        labels = torch.tensor([e.labels + [packing.IGNORE_INDEX] * n for e, n in zip(chosen, pad, strict=True)])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return tuned(input_ids=ids, attention_mask=mask, labels=labels).loss

    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    with torch.no_grad():
        total = sum(loss_of(b).item() * sum(e.n_supervised for e in b) for b in batches)
    for batch in batches[:2]:
        loss_of(batch).backward()
        optimizer.zero_grad()
    start = time.perf_counter()
    for batch in batches:
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    count = sum(e.n_supervised for e in examples)
    return {"loss": total / count, "tokens": sum(len(e.input_ids) for e in examples), "seconds": seconds}


def trl(chats: list, dtype: str, size: int, **options) -> dict:
    """SFTTrainer on the same token ids; `completion_mask` names the answers, as its own preprocessing would."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from telco_nb.lora import packing

    tuned, tokenizer = load(dtype)
    examples = [packing.encode_conversation(tokenizer, chat, str(i), 1024) for i, chat in enumerate(chats)]
    data = Dataset.from_list(
        [{"input_ids": e.input_ids, "completion_mask": [int(x >= 0) for x in e.labels]} for e in examples]
    )
    with tempfile.TemporaryDirectory() as folder:
        fixed = arguments(
            folder, per_device_train_batch_size=size, max_length=1024, completion_only_loss=True, **options
        )
        made = {"model": tuned, "args": SFTConfig(**fixed), "processing_class": tokenizer}
        warm = SFTTrainer(train_dataset=data.select(range(WARM)), eval_dataset=data, **made)
        loss = weighted(warm, data)
        warm.train()
        seconds = timed(SFTTrainer(train_dataset=data, **made))
    return {"loss": loss, "tokens": sum(len(e.input_ids) for e in examples), "seconds": seconds}


def weighted(trainer, data) -> float:
    """The trainer's own loss on all conversations, weighted by answer tokens."""
    import torch

    total = count = 0.0
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            supervised = (batch["labels"][:, 1:] >= 0).sum().item()
            total += trainer.compute_loss(trainer.model, batch).item() * supervised
            count += supervised
    return total / count


def timed(trainer) -> float:
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def mean(losses: dict) -> float:
    return sum(loss.sum() for loss in losses.values()) / sum(map(len, losses.values()))


def measure(kind: str) -> dict:
    """Train once in this process; peak_gflops is the best matmul seen just before and after."""
    import resource

    import torch

    chats = conversations(CONVERSATIONS)
    dtype = "bfloat16" if kind.split()[-1] in ("bf16", "default", "best") else "float32"
    from telco_nb.lora import device

    peak = device.choose_dtype("auto")[1][dtype]
    if kind.startswith("ours"):
        found = ours(chats, dtype)
    elif kind.startswith("padded"):
        found = padded(chats, dtype)
    elif kind == "TRL default":  # float32 weights; batch of 8, bfloat16 autocast and checkpointing are SFTConfig's
        found = trl(chats, "float32", 8)
    else:
        found = trl(chats, "bfloat16", 1, bf16=True, gradient_checkpointing=False, loss_type="nll")
    peak = max(peak, device.matmul_gflops(getattr(torch, dtype)))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"kind": kind, "peak_gflops": peak, "memory_gb": memory / 1e9}


def main(repeats: int, kinds: tuple[str, ...] = KINDS) -> dict[str, dict[str, float]]:
    results: dict[str, list[dict]] = {kind: [] for kind in kinds}
    environment = os.environ | {"GOMP_SPINCOUNT": "20000", "HF_HUB_OFFLINE": "1"}
    for repeat in range(repeats):
        for kind in kinds:
            command = [sys.executable, __file__, "--measure", kind]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{kind} failed:\n{done.stderr[-2000:]}")
            results[kind].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  repeat {repeat + 1} {kind}: {rate(results[kind][-1]):.0f} tokens/s", flush=True)
    table = {kind: summary(found) for kind, found in results.items()}
    check_losses(table)
    show(table, results)
    return table


def rate(one: dict) -> float:
    return one["tokens"] / one["seconds"]


def summary(found: list[dict]) -> dict[str, float]:
    medians = {k: statistics.median(one[k] for one in found) for k in ("loss", "tokens", "peak_gflops", "memory_gb")}
    shares = [one["gflops"] / one["peak_gflops"] for one in found if "gflops" in one]
    share = statistics.median(shares) if shares else None
    return medians | {"tokens_per_second": statistics.median(map(rate, found)), "share_of_peak": share}


def check_losses(table: dict[str, dict[str, float]]) -> None:
    """All train on the same labels: float32 losses agree to 1e-5, bfloat16 ones to 1e-2."""
    wanted = table["ours fp32"]["loss"] if "ours fp32" in table else next(iter(table.values()))["loss"]
    for kind, row in table.items():
        tolerance = 1e-2 if kind.split()[-1] in ("bf16", "default", "best") else 1e-5
        difference = abs(row["loss"] / wanted - 1)
        assert difference < tolerance, f"{kind}: loss {row['loss']:.6f}, not {wanted:.6f}"


def show(table: dict[str, dict[str, float]], results: dict[str, list[dict]]) -> None:
    print(f"\n{'':18} tokens/s  of matmul peak   loss      peak memory   ours is faster by (median of paired ratios)")
    best = results.get("ours bf16") or next(iter(results.values()))
    for kind, row in table.items():
        share = f"{row['share_of_peak']:8.0%}" if row["share_of_peak"] else "       -"
        ratio = statistics.median(rate(a) / rate(b) for a, b in zip(best, results[kind], strict=True))
        print(
            f"{kind:18} {row['tokens_per_second']:8.0f}  {share} of {row['peak_gflops']:4.0f}  "
            f"{row['loss']:.6f}  {row['memory_gb']:8.1f} GB  {ratio:8.2f} x"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 5, tuple(sys.argv[2:]) or KINDS)
