"""Helpers shared by the notebooks: which LoRA configuration answers telecom customers, and at what energy?"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
__version__ = "0.1.0"
