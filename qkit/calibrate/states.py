"""Hidden states of a whole text between two decoder blocks: few in memory, many in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .. import units
from ..errors import QkitError

if TYPE_CHECKING:
    import torch

IN_MEMORY = 256 << 20  # bytes of states; more of them go to a temporary file


class States:
    """Tensors of one type on the CPU, one for each batch of a text: in memory, or in a file without a name that is gone
    with this object. One that takes another's place has its shape. None is to be changed by who reads it."""

    def __init__(self, count: int, folder: str | os.PathLike[str] | None = None):
        """count: about how many there will be, of the size of the first; folder: where a file is put, by default that
        for temporary files."""
        self._count, self._folder = count, folder
        self._shapes: list[tuple[int, ...]] = []
        self._offsets: list[int] = [0]
        self._held: list[torch.Tensor] = []
        self._file: IO[bytes] | None = None

    def append(self, states: torch.Tensor) -> None:
        """Raises QkitError where there is no room on disk."""
        if not self._shapes:
            self._dtype = states.dtype
            if self._count * states.nbytes > IN_MEMORY:
                self._file = self._open(self._count * states.nbytes)
        self._shapes.append(tuple(states.shape))
        self._offsets.append(self._offsets[-1] + states.nbytes)
        if self._file is None:
            self._held.append(states.to("cpu", copy=True))
        else:
            self[len(self) - 1] = states

    def _open(self, nbytes: int) -> IO[bytes]:
        place = self._folder or tempfile.gettempdir()
        try:
            file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115  # closed with this object
            # Room is taken now, not in the middle of a block.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            return file
        except OSError as error:
            hint = "free some space there" if self._folder else "set TMPDIR to a folder on a larger disk"
            raise QkitError(
                f"{units.size(nbytes)} of hidden states have no room in {Path(place)}: {error.strerror}", hint
            ) from error

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> torch.Tensor:
        import torch

        if self._file is None:
            return self._held[index]
        found = torch.empty(self._shapes[index], dtype=self._dtype)
        self._transfer(os.preadv, found, index)
        return found

    def __setitem__(self, index: int, states: torch.Tensor) -> None:
        if tuple(states.shape) != self._shapes[index]:
            raise ValueError(f"{list(states.shape)} in the place of {list(self._shapes[index])}")
        if self._file is None:
            self._held[index] = states.detach().to("cpu")
        else:
            self._transfer(os.pwritev, states.detach().to("cpu").contiguous(), index)

    def _transfer(self, call: Any, states: torch.Tensor, index: int) -> None:
        """Read or write all of one tensor: the system does at most 2 GiB a call."""
        import torch

        assert self._file is not None
        data, done = states.view(-1).view(torch.uint8).numpy().data, 0
        try:
            while done < len(data):
                moved = call(self._file.fileno(), [data[done : done + (1 << 30)]], self._offsets[index] + done)
                if not moved:
                    raise OSError("the temporary file ends early")
                done += moved
        except OSError as error:
            raise QkitError(
                f"hidden states cannot be kept in {self._folder or tempfile.gettempdir()}: {error.strerror or error}",
                "run the same command again once the disk is well",
            ) from error
