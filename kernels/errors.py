"""What the kernels raise besides ValueError and TypeError for misuse."""

from __future__ import annotations


class NonFiniteError(ValueError):
    """A weight is NaN or infinite."""


class ScaleOverflowError(ValueError):
    """A scale does not fit the type it is to be stored in."""
