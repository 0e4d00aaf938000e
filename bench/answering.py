"""Answer tokens per second: batched decoding against transformers' generate, one by one and batched.

`python bench/answering.py [repeats]`; the same prompts and the same limit of new tokens, turns taken in each repeat.
"""

import statistics
import sys
import time

import torch

from telco_nb.lora import base_model, chat_template, decoding, device

PROMPTS, NEW_TOKENS, SINGLES = 40, 40, 3


def prompts(tokenizer) -> list[list[int]]:
    texts = [
        f"My eSIM does not activate on phone number {i}. " + "Please help me now. " * (i % 8) for i in range(PROMPTS)
    ]
    return [chat_template.prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def one_by_one(base, encoded: list[list[int]], end: int) -> list[list[int]]:
    base.set_attn_implementation("sdpa")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    found = [base.generate(input_ids=torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in encoded]
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in found]


def batched(base, encoded: list[list[int]], end: int) -> list[list[int]]:
    base.set_attn_implementation("sdpa")
    width = max(map(len, encoded))
    ids = torch.tensor([[end] * (width - len(p)) + p for p in encoded])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in encoded])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    found = base.generate(input_ids=ids, attention_mask=mask, **options)[:, width:].tolist()
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in found]


def rate(make, *arguments) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    made = make(*arguments)
    return sum(map(len, made)) / (time.perf_counter() - start), made


def main(repeats: int) -> None:
    base_model.silence_libraries()
    base, tokenizer = base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)
    end, encoded = chat_template.end_token_id(tokenizer), prompts(tokenizer)
    base.eval()
    exact = decoding.generate(base, encoded[:SINGLES], end, NEW_TOKENS)
    assert exact == one_by_one(base, encoded[:SINGLES], end), "batched and single greedy answers differ in float32"
    base.to(device.choose_dtype("auto")[0])
    found: dict[str, list[float]] = {"ours, batched": [], "generate, batched": [], "generate, one by one": []}
    for _ in range(repeats):
        found["ours, batched"].append(rate(decoding.generate, base, encoded, end, NEW_TOKENS)[0])
        found["generate, batched"].append(rate(batched, base, encoded, end)[0])
        found["generate, one by one"].append(rate(one_by_one, base, encoded[:SINGLES], end)[0])
    print(f"{'':22} tokens/s   ours is faster by (median of paired ratios), {base.dtype}")
    for name, rates in found.items():
        ratio = statistics.median(a / b for a, b in zip(found["ours, batched"], rates, strict=True))
        print(f"{name:22} {statistics.median(rates):8.0f}   {ratio:6.2f} x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 5)
