"""Prompts of a wanted number of tokens for a server whose tokenizer is not here, each of them different."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

_NONCE = 8  # hexadecimal characters


@dataclass(frozen=True)
class Prompts:
    """Stretches of a text, each from another place. Each begins with a number drawn by chance, so that no cache of
    prefixes helps, one left over from an earlier run included.

    size   characters of each
    """

    text: str
    size: int

    def __getitem__(self, index: int) -> str:
        """`size` characters; a short text is repeated."""
        start = index * 7919 % len(self.text)  # a prime step: places all over the text, and none twice for long
        needed = max(0, self.size - 2 * _NONCE - 1)
        turned = self.text[start:] + self.text[:start]
        body = (turned * (needed // len(turned) + 1))[:needed]
        return f"{secrets.token_hex(_NONCE)} {body}"
