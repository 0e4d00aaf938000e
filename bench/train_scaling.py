"""How the packed step scales: real tokens per second against row size, rank and conversation length; fused and plain.

`python bench/train_scaling.py [repeats] [float32 | bfloat16]`; one row each, forward and backward, medians. The share
is of the best matmul timed beside these steps.
"""

import statistics
import sys
import time

import torch
from peft import LoraConfig

from telco_nb.lora import base_model, device, kernels, packing, step
from telco_nb.lora.packing import IGNORE_INDEX, Example

CASES = [  # tokens a row, tokens a conversation, rank
    (512, 256, 16), (1024, 256, 16), (2048, 256, 16),
    (1024, 128, 16), (1024, 512, 16), (1024, 1024, 16),
    (1024, 256, 8), (1024, 256, 64),
]  # fmt: skip


def row(tokens: int, length: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A row of random tokens, half of them labelled."""
    ids = torch.randint(0, 49_000, (length,)).tolist()
    example = Example("x", ids, [IGNORE_INDEX] * (length // 2) + ids[length // 2 :])
    return packing.collate([example] * (tokens // length)), [length] * (tokens // length)


def seconds(tuned, made: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    step.token_losses(tuned, made).mean().backward()
    return time.perf_counter() - start


def main(repeats: int = 5, wanted: str = "auto") -> None:
    base_model.silence_libraries()
    dtype, _ = device.choose_dtype(wanted)
    base, _ = base_model.load_model(base_model.PACKAGED_MODEL, dtype)
    print(f"{dtype}\n row  conversation  rank   fused tokens/s  share of peak   plain tokens/s   fused / plain")
    for tokens, length, rank in CASES:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=step.TARGET_MODULES["all"])
        tuned, (made, segments) = step.attach_adapters(base, lora), row(tokens, length)
        times: dict[str, list[float]] = {"fused": [], "plain": []}
        peaks: list[float] = []
        for _ in range(repeats):
            for kind in times:
                step.prepare_step(tuned)
                if kind == "plain":
                    kernels.unfuse(tuned)
                seconds(tuned, made)  # as in a training, each follows one of its kind
                peaks.append(device.matmul_gflops(dtype))  # beside every step, as the machine's speed moves
                times[kind].append(seconds(tuned, made))
        fast, slow = (statistics.median(t) for t in times.values())
        share = step.step_flops(tuned, tokens, sum(segments) // 2, segments) / fast / 1e9 / max(peaks)
        case, best = f"{tokens:4} {length:13} {rank:5} {tokens / fast:16.0f}", max(peaks)
        print(f"{case} {share:6.0%} of {best:3.0f} {tokens / slow:16.0f} {slow / fast:15.2f} x", flush=True)
        base = tuned.unload()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
