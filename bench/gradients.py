"""How far each variant of the training step is from float32: gradients of one row, in the shape of Qwen2.5-3B.

`python bench/gradients.py [variants]` has random weights, rounded to bfloat16 for all of them. The float32 step is
plain transformers and peft. Told is the norm of the difference relative to float32's norm, for all adapters and for
those of the first layers, to which all others lead; then the same relative to the plain step in bfloat16, as in
bench/gpu.py. `--tiny` runs it with tiny sizes on a processor.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import gpu
from telco_nb.lora import device

VARIANTS = ("plain", "no-cast", "fused", "compiled", "compiled+graph")
SIZES = gpu.Sizes(row=2048, rows=1)  # float32 holds four times what bfloat16 does
FIRST = gpu.GRADIENT_KEPT


def gradient(variant: str, sizes: gpu.Sizes) -> torch.Tensor:
    """The gradients of all adapters for the first row, in one float32 vector on the processor."""
    tuned, dtype = gpu.make_model(sizes, torch.bfloat16).train(), torch.bfloat16
    if variant == "float32":
        tuned, dtype = tuned.float(), torch.float32
    with device.repeatable():
        gpu.step_of(tuned, "plain" if variant == "float32" else variant, gpu.make_rows(sizes), sizes, dtype)(0)
    return torch.cat([p.grad.float().flatten().cpu() for p in tuned.parameters() if p.grad is not None])


def relative(own: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Norm of the difference over the other's norm: of all, and of the first layers."""
    pairs = [(own, other), (own[:FIRST], other[:FIRST])]
    return tuple(((a - b).norm() / b.norm()).item() for a, b in pairs)


def main(variants: tuple[str, ...] = VARIANTS, tiny: bool = False) -> dict[str, tuple[float, ...]]:
    """Print a line for each variant; returns its four distances."""
    sizes = gpu.TINY if tiny else SIZES
    exact = gradient("float32", sizes)
    print("variant         to float32: all, first   to plain: all, first")
    plain, found = gradient("plain", sizes), {}
    for variant in variants:
        if reason := gpu.missing(variant):
            print(f"{variant:15} {reason}")
            continue
        own = plain if variant == "plain" else gradient(variant, sizes)
        found[variant] = (*relative(own, exact), *relative(own, plain))
        print(f"{variant:15} {found[variant][0]:15.4f} {found[variant][1]:9.4f} {found[variant][2]:13.4f} "
              f"{found[variant][3]:9.4f}", flush=True)  # fmt: skip
    return found


if __name__ == "__main__":
    chosen = tuple(name for name in sys.argv[1:] if name != "--tiny")
    main(chosen or VARIANTS, tiny="--tiny" in sys.argv)
