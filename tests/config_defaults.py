"""Makes qkit/models/data/config_defaults.json: what transformers' config classes have where config.json says nothing.

    python tests/config_defaults.py        writes the file anew

Class defaults, not those of an instance: an instance has filled in what depends on other keys. Of each class the keys
that qkit.models.architecture names anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parents[1] / "qkit" / "models"
FILE = MODELS / "data" / "config_defaults.json"


def words() -> set[str]:
    """Everything that stands in quotes in the package's code, which is more than keys of configs."""
    code = "".join(path.read_text(encoding="utf-8") for path in (MODELS / "architecture").glob("*.py"))
    return set(re.findall(r'"(\w+)"', code))


def kinds() -> list[str]:
    from transformers import CONFIG_MAPPING

    from qkit.models.architecture.encoders import ENCODERS
    from qkit.models.architecture.families import FAMILIES
    from qkit.models.architecture.multimodal import KINDS
    from qkit.models.architecture.towers import TOWERS

    return sorted(kind for kind in {*FAMILIES, *ENCODERS, *KINDS, *TOWERS} if kind in CONFIG_MAPPING)


def extract() -> dict[str, Any]:
    import transformers
    from transformers import CONFIG_MAPPING

    known = words()
    found = {}
    for kind in kinds():
        values = {}
        for field in dataclasses.fields(CONFIG_MAPPING[kind]):
            value = field.default
            if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
                value = field.default_factory()
            if isinstance(value, tuple):
                value = list(value)
            if field.name in known and isinstance(value, (bool, int, float, str, list)):
                values[field.name] = value
        found[kind] = values
    return {"transformers": transformers.__version__, "defaults": found}


def dump(found: dict[str, Any]) -> str:
    """One line a class."""
    rows = (f"    {json.dumps(kind)}: {json.dumps(values)}" for kind, values in found["defaults"].items())
    version = json.dumps(found["transformers"])
    return f'{{\n  "transformers": {version},\n  "defaults": {{\n' + ",\n".join(rows) + "\n  }\n}\n"


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(dump(extract()), encoding="utf-8")
