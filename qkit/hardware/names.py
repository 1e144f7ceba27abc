"""What people, drivers and benchmarks call a device, made comparable.

A name becomes a key (lower case, no vendor, no spaces), the memory that it states, and the cores:
"NVIDIA A100-SXM4-80GB" and "A100 80GB SXM" are both ("a100sxm", 80).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Words that tell no two devices apart: vendors and brands, kinds of memory, what a driver or a benchmark puts around.
_NOISE = {
    "nvidia", "geforce", "tesla", "quadro", "amd", "ati", "radeon", "instinct", "intel", "apple", "gpu", "cpu",
    "graphics", "card", "accelerator", "processor", "with", "w", "oam", "hbm2", "hbm2e", "hbm3", "hbm3e", "gddr6",
    "gddr6x", "gddr7", "generation", "gen",
}  # fmt: skip


@dataclass(frozen=True)
class Name:
    """key: what is compared; gib: memory stated, None where none is; cores: "76c" where stated."""

    key: str
    gib: float | None
    cores: str


def read(text: str) -> Name:
    """The parts of a name. In parentheses stand remarks ("(330W)", "(R)"), so they do not count."""
    text = re.sub(r"\([^)]*\)", " ", text.lower())
    text = re.sub(r"@.*|\bn/s\b", " ", text)  # a clock; "not stated"
    text = re.sub(r"(\d)\s+(gi?b)\b", r"\1\2", text)
    text = re.sub(r"(\d+)[\s-]*cores?\b", r"\1c", text)
    kept, gib, cores = [], None, ""
    for word in re.findall(r"[a-z0-9+]+(?:\.\d+)?", text):
        memory = re.fullmatch(r"(\d+(?:\.\d+)?)(?:g|gb|gib)", word)
        if memory:
            gib = float(memory[1])
        elif re.fullmatch(r"\d+c", word):
            cores = word
        elif word not in _NOISE and not re.fullmatch(r"\d+t|\d+(st|nd|rd|th)", word):  # threads; "13th Gen"
            kept.append(re.sub(r"^(sxm)\d$", r"\1", word))
    return Name("".join(kept), gib, cores)
