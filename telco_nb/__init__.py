"""Helpers shared by the notebooks: which LoRA configuration answers telecom customers, and at what energy?"""

import logging
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
ROOT = PACKAGE_DIR.parent
DATA_DIR = PACKAGE_DIR / "data"
__version__ = "0.1.0"

# On import, bitsandbytes asks for an optional package that 4-bit weights on a CPU would use; none are used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
