"""`import qkit` from a checkout that nobody installed: with torch and triton alone, no pip and no network.

An installed qkit has the folder kernels/ as `qkit.kernels`; a checkout has it beside qkit/. Importing this module makes
up for that where qkit is not installed, and changes nothing where it is. The CPU kernels are then the torch reference.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("qkit") is None:
    sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("qkit.kernels") is None:
    import qkit

    qkit.__path__.append(str(ROOT))
