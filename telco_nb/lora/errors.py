"""What ends a run before a training, with exit code 3."""


class PreflightError(RuntimeError):
    """Training cannot run here, noticed before it starts. The message gives the reason and the remedy."""


class ModelError(PreflightError):
    """The base model cannot be used. The message gives the reason and the remedy."""
