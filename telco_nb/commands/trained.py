"""A trained configuration of a study: finds its adapter, checks it, and loads the model that would be deployed.

torch is imported only when a model is loaded, so that the other commands start at once.
"""

from __future__ import annotations

import glob
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from telco_nb.commands.common import CommandError
from telco_nb.engine.runner import UnfitError
from telco_nb.hosted import egress
from telco_nb.study import params
from telco_nb.study.record import BASE_FILE, profile_root, read_manifest, read_object, step_dir
from telco_nb.study.seal import require_unchanged

if TYPE_CHECKING:
    import torch

ADAPTER = "artefacts/adapter/"  # in the folder of 03_train
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A trained configuration, such as c04.")]


class Trained(NamedTuple):
    """A trained configuration. `values` are the parameters of training and answering, `base` is base_model.json."""

    config: str
    profile: str
    root: Path  # of the study
    manifest: dict[str, Any]  # of 03_train
    adapter: Path
    values: dict[str, Any]
    base: dict[str, Any]

    @property
    def device(self) -> dict[str, Any]:
        """Facts about the machine that trained it."""
        return self.manifest["device"]


def find_trained(profile: str, config: str) -> Trained:
    """The adapter of a configuration as 03_train has recorded it.

    Raises:
        ParameterError: there is no such profile.
        CommandError: the configuration is not trained.
        RecordError: a file of its adapter is not the one that was written.
    """
    root = profile_root(profile)
    known = sorted(path.parent.name for path in root.glob("*/03_train") if (path / "manifest.json").is_file())
    if config in known:
        require_unchanged(
            root, f"{glob.escape(config)}/03_train/{ADAPTER}*", f"{glob.escape(config)}/04_energy/metrics.json"
        )
    manifest = read_manifest(root, config, "03_train") if config in known else None
    again = f"./run_all.py --profile {profile} --configs {config} --steps 03"
    if manifest is None:
        params.load_study(profile)  # a misspelt profile is named as such
        raise CommandError(f"{root} holds no trained {config}. Trained: {', '.join(known) or 'none'}. Run: {again}")
    adapter = step_dir(root, config, "03_train") / ADAPTER
    if not (adapter / BASE_FILE).is_file():
        raise CommandError(f"{adapter} is of an older version: it does not name its base model. Run: {again}")
    answering = read_manifest(root, config, "04_energy")
    others = answering["parameters"] if answering else params.load_study(profile).values(config)
    base = read_object(adapter / BASE_FILE)
    return Trained(config, profile, root, manifest, adapter, others | manifest["parameters"], base)


def answer_dtype(trained: Trained) -> torch.dtype:
    """The number format in which 04_energy let the configuration answer; before that, the one it would choose here."""
    import torch

    from telco_nb.lora.device import choose_dtype

    path = step_dir(trained.root, trained.config, "04_energy") / "metrics.json"
    if path.is_file() and (name := read_object(path).get("dtype")):
        return getattr(torch, name)
    _use_device(trained)
    return choose_dtype(trained.values["dtype"])[0]


def _use_device(trained: Trained) -> None:
    """Answers are computed on the processor as in the study; what a GPU has trained may be asked without one.

    Raises UnfitError: there is a GPU, and it cannot be used.
    """
    from telco_nb.lora.device import use_device

    with model_errors():
        use_device("cpu" if trained.values.get("device") == "cpu" else "auto")


def load_base(trained: Trained) -> tuple[Any, Any]:
    """The base model in float32 and its tokenizer; (model, tokenizer).

    Raises:
        UnfitError: the base model cannot be loaded.
        CommandError: its weights are not those of the training.
    """
    import torch

    from telco_nb.lora.base_model import load_model, silence_libraries, weights_checksum

    silence_libraries()
    egress.log_hub(trained.root)
    _use_device(trained)
    with model_errors():
        model, tokenizer = load_model(
            trained.values["base_model"], torch.float32, revision=trained.values.get("base_model_revision")
        )
    checksum, dtype = trained.base["checksum"], getattr(torch, trained.base["dtype"])
    found = weights_checksum(model, biases=trained.values["bias"] == "none", dtype=dtype)
    if trained.base["quantization"] == "none" and found != checksum:
        raise CommandError(
            f"{trained.values['base_model']} does not hold the weights that {trained.config} was trained on: their "
            f"checksum was {checksum[:12]}. Bring those back, or train it again."
        )
    return model, tokenizer


def load_deployed(trained: Trained, dtype: torch.dtype, tuned: bool = True) -> tuple[Any, Any]:
    """The model that would be deployed, merged as in 04_energy, and its tokenizer. `tuned` False: the base model."""
    from telco_nb.lora.decoding import merge_adapter

    base, tokenizer = load_base(trained)
    return merge_adapter(base, trained.adapter if tuned else None, dtype, trained.values["base_model"]), tokenizer


@contextmanager
def model_errors() -> Generator[None]:
    """Turns an error of the base model into one that ends a command with exit code 3."""
    from telco_nb.lora.errors import PreflightError

    try:
        yield
    except PreflightError as error:
        raise UnfitError(str(error)) from None
