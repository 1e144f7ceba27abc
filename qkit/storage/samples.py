"""Where to look into a tensor so that two checkpoints are told apart without being read."""

from __future__ import annotations

from collections.abc import Iterator

from .store import Reader, read_bytes

_WHOLE = 4096  # bytes: below that a tensor is looked at whole
_NEAR = 1 << 16  # below that one read that spans the spots is cheaper than one for each
_SPOTS, _SPOT = 4, 1024


def sample(reader: Reader, offset: int, nbytes: int) -> bytes:
    """A few spots of the `nbytes` of a tensor at `offset`. Raises QkitError where the file changed."""
    if nbytes <= _NEAR:
        data = read_bytes(reader, offset, nbytes)
        return b"".join(data[at : at + length] for at, length in spots(0, nbytes))
    return b"".join(read_bytes(reader, at, length) for at, length in spots(offset, nbytes))


def spots(offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is read of a tensor's bytes: all of a small one, else spots from start to end."""
    if nbytes <= _WHOLE:
        if nbytes:
            yield offset, nbytes
        return
    for i in range(_SPOTS):
        yield offset + (nbytes - _SPOT) * i // (_SPOTS - 1), _SPOT
