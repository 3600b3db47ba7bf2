"""The kernels by name: on a GPU where there is one, else interpreted on CPU tensors."""

from __future__ import annotations

import sys
from pathlib import Path

# Use the helpers of the operations' tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
