"""What the layers of a model run on: counted while they are loaded, and a part of the name of the compiled model.

vLLM finds a compiled model again by its version, its configs, its environment variables and the traced sources. Which
kernel each layer was given is in none of them: what was compiled before qkit was installed, with another version of it,
or while its library could not be loaded, would meet layers whose weights have moved, and end the server. But the
environment variables are a table of names and functions (`vllm.envs.environment_variables`), and all of them count
(`compile_factors`): with the first layer that is ours, what layers run on is entered there. A model without one keeps
its name.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from ... import __version__

NAME = "QKIT_KERNELS"  # in vLLM's table; nothing reads a variable of that name

# vLLM's own name is the prefix: shown, and formatted, as vLLM's own lines are.
_log = logging.getLogger("vllm.plugins.qkit")


class Loading:
    """Counts layers until every one that was made has its weights, then says in one line what they run on."""

    def __init__(self, variables: dict[str, Callable[[], Any]]) -> None:
        self.made = 0
        self._variables = variables
        self._kernels: Counter[str] = Counter()
        self._models: set[str] = set()  # the lines of whole models

    def ours(self, kernel: str, what: str = "linears") -> None:
        """Another layer, or block of experts, runs on this kernel of qkit's."""
        self._variables[NAME] = self._factor
        self._done(f"{what} on {kernel}")

    def theirs(self, kernel: str) -> None:
        """Another layer was left to this kernel of vLLM's."""
        self._done(f"linears on vLLM's {kernel}")

    def _done(self, what: str) -> None:
        self._kernels[what] += 1
        if self._kernels.total() == self.made:
            line = _counted(self._kernels)
            _log.info("qkit's kernels: %s", line)
            self._models.add(line)
            self.made, self._kernels = 0, Counter()  # a draft model may follow

    def _factor(self) -> str:
        """Of every model that this process has loaded, and of what is there of one more."""
        lines = self._models | ({_counted(self._kernels)} if self._kernels else set())
        return f"qkit {__version__}: {'; '.join(sorted(lines))}"


def _counted(kernels: Counter[str]) -> str:
    return ", ".join(f"{kernels[name]} {name}" for name in sorted(kernels))
