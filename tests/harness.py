"""What test modules share: where things are."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Test data that is not committed; tests that use it skip where it is missing.
DATA = Path(os.environ.get("GPTKERNELS_DATA") or ROOT.parent / "shared" / "data")
