"""Kill -9 a short training of the real model at random moments, resume it, and compare the adapters bit by bit.

`python bench/kills.py [kills]`: prints how many resumed trainings ended with the adapter of the undisturbed one.
"""

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from telco_nb import ROOT

CHECKPOINT_SECONDS, EPOCHS, CHATS = 0.2, 3, 12


def train(folder: Path) -> None:
    """One training, or the rest of it, in this process; writes the adapter's hash."""
    import torch
    from peft import LoraConfig
    from transformers import TrainingArguments

    from telco_nb.lora import base_model, device, energy, packing, step
    from telco_nb.lora.trainer import PackedTrainer, TrainingMonitor, constant_arguments, last_checkpoint

    base_model.silence_libraries()
    base, tokenizer = base_model.load_model(base_model.PACKAGED_MODEL, device.choose_dtype("bfloat16")[0])
    words = [("My router is slow. " * (1 + i % 3), f"Please restart router {i}.") for i in range(CHATS)]
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in words]
    examples = [packing.encode_conversation(tokenizer, chat, str(i), 256) for i, chat in enumerate(chats)]
    torch.manual_seed(1)
    tuned = step.attach_adapters(base, LoraConfig(r=8, target_modules=step.TARGET_MODULES["all"]))
    step.prepare_step(tuned)
    rows = packing.PackedRows(examples, 128, 1)
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=EPOCHS, per_device_train_batch_size=1, learning_rate=1e-3, seed=1,
        disable_tqdm=True, **constant_arguments(),
    )  # fmt: skip
    meter = energy.Meter((2.0, 5.0, 12.0), 0.3)

    def say(text: str) -> None:
        print(text, flush=True)

    watch = TrainingMonitor(meter, CHECKPOINT_SECONDS, rows, log=say)
    trainer = PackedTrainer(tuned, arguments, train_dataset=rows, data_collator=packing.only_row, callbacks=[watch])
    trainer.train(resume_from_checkpoint=last_checkpoint(folder, rows.fingerprint, say))
    digest = hashlib.sha256()
    for name, parameter in sorted(tuned.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
    (folder / "hash.json").write_text(json.dumps(digest.hexdigest()))


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--train", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def whole(folder: Path) -> tuple[str, float]:
    """(adapter hash, seconds from the first step to the last) of a training that nobody disturbs."""
    process = start(folder)
    process.stdout.readline()
    first = last = time.monotonic()
    for _ in process.stdout:  # a line a step
        last = time.monotonic()
    if process.wait():
        raise SystemExit("the undisturbed training failed")
    return json.loads((folder / "hash.json").read_text()), last - first


def killed(folder: Path, moment: float) -> tuple[str, str]:
    """(adapter hash, where it was resumed) after a kill `moment` seconds behind the first step's log line."""
    process = start(folder)
    process.stdout.readline()
    time.sleep(moment)
    process.kill()
    process.wait()
    again = start(folder)
    said = again.communicate()[0].splitlines()
    resumed = next((line for line in said if line.startswith("resumed")), "started anew")
    return json.loads((folder / "hash.json").read_text()) if again.returncode == 0 else "failed", resumed


def main(kills: int, seed: int = 0) -> None:
    random.seed(seed)
    with tempfile.TemporaryDirectory() as name:
        wanted, seconds = whole(Path(name) / "whole")
        same = 0
        for i in range(kills):
            moment = random.uniform(0, seconds)
            found, how = killed(Path(name) / str(i), moment)
            same += found == wanted
            print(
                f"  killed {moment:.2f} s after the first step, {how}: {'same' if found == wanted else found}",
                flush=True,
            )
    print(f"{same} of {kills} killed trainings ended with the same adapter, bit for bit")
    sys.exit(same != kills)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 20)
