"""One model after the other: loaded or run block by block, timed, scored, and freed before the next."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..hardware import memory as process
from ..progress import track
from . import facts, memory, quality, speed, states
from .streamed import Streamed
from .types import Measured, Speed

if TYPE_CHECKING:
    import torch

    from ..hardware.detect import LocalDevice
    from .footprint import Footprint
    from .quality import Quality
    from .room import Subject

IN_TURNS = "in turns with the baseline"
WITH_EACH = "in turns with each model"
ALONE = "no other model in memory"
UNTIMED = "not timed: the model does not fit the memory, and ran block by block"


@dataclass(frozen=True)
class Bench:
    """What all models of a profile are measured with.

    tokens   int64 [chunks, n_ctx], of the evaluation text
    prompt   int64 [1, length] of it, of every timed run
    batches  sizes, each timed
    ceiling  GB/s at which the device reads memory
    said     name of a model -> what was predicted of it"""

    where: LocalDevice
    tokens: torch.Tensor
    prompt: torch.Tensor
    context: int
    batches: tuple[int, ...]
    ceiling: float
    said: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def time(self, models: Sequence[Any], label: str) -> list[list[Speed]]:
        """For each model, its speed at each batch size; several models take turns."""
        found: list[list[Speed]] = [[] for _ in models]
        with track(f"speed of {label}", len(models) * len(self.batches) * (speed.REPEATS + 1), "runs") as advance:
            for size in self.batches:
                prompt = self.prompt.repeat(size, 1)
                times = {"repeats": speed.REPEATS, "generated": speed.GENERATED}
                for own, each in zip(found, speed.measure(models, prompt, self.ceiling, advance, **times), strict=True):
                    own.append(each)
        return found

    def stream(self, subject: Subject) -> Streamed:
        """Run a model block by block over the evaluation text."""
        from ..runtime.frame import Frame

        frame = Frame(subject.source, self.where.id)
        with track(f"{subject.name}, block by block", frame.model.config.num_hidden_layers, "blocks") as advance:
            return Streamed(frame).run(self.tokens, advance)

    def row(self, subject: Subject, run: facts.Run, found: Footprint | str, **measured: Any) -> Measured:
        said = self.said.get(subject.name)
        return facts.measured(
            subject, run, found, self.where, self.context, max(self.batches), predicted=said, **measured
        )


class Baseline:
    """What models are compared with: loaded beside each of them; or its last hidden states and its head, which it left
    behind when it was loaded before them, or ran block by block."""

    def __init__(self, bench: Bench, subject: Subject, found: Footprint | str, beside: bool):
        from ..runtime import load

        self.bench, self.subject, self.found = bench, subject, found
        self.model: Any = None
        self._times: list[list[Speed]] = []
        self._problems: list[str] = []
        self._how = UNTIMED
        if not subject.loaded:
            streamed = bench.stream(subject)
            self._ran: Callable[[], facts.Run] = partial(_run_of, streamed)
            self._logits: Callable[[], Generator[torch.Tensor, None, None]] = streamed.logits
            return
        model = load(subject.source, device=bench.where.id)
        with track(f"{subject.name} over the text", len(bench.tokens)) as advance:
            kept = states.of_loaded(model, bench.tokens, advance)
        if beside:
            self.model, self._how = model, WITH_EACH
            self._ran = partial(facts.of_loaded, model)
            self._logits = partial(states.logits, model, kept, model.device)
        else:
            self._how = ALONE
            try:
                self._times = bench.time([model], subject.name)
            except Exception as error:
                self._problems.append(f"speed: {said(error)}")
            self._logits = Streamed(_frame(subject, bench), kept).logits
            # As it is now that it ran: kernels choose their layouts with the first run.
            run = facts.of_loaded(model)
            self._ran = lambda: run
        self._read = memory.read_per_token(model)

    def logits(self) -> Generator[torch.Tensor, None, None]:
        """[n_ctx, vocab] for each chunk of the evaluation text."""
        return self._logits()

    def saw(self, theirs: list[Speed], ours: list[Speed]) -> float:
        """Of runs in turns with a model, for each batch size: how many times as fast the model was."""
        self._times.append(ours)
        return theirs[0].generate_tps / ours[0].generate_tps

    def beaten_by(self, theirs: list[Speed]) -> float | None:
        """The same of runs at another time than those of the baseline; None where it was not timed."""
        return theirs[0].generate_tps / self._times[0][0].generate_tps if self._times else None

    def row(self) -> Measured:
        speeds = [speed.pooled(each, self._read, self.bench.ceiling) for each in zip(*self._times, strict=True)]
        how = "not timed: of no model beside it the runs came to an end" if self.model and not speeds else self._how
        return self.bench.row(
            self.subject, self._ran(), self.found, speeds=speeds, speed_how=how, problems=self._problems
        )


def measure(bench: Bench, subject: Subject, found: Footprint | str, baseline: Baseline | None) -> Measured:
    """Time and score one model. What fails after something was measured is among the row's problems.

    Raises what failed where nothing was."""
    return (_loaded if subject.loaded else _streamed)(bench, subject, found, baseline)


def _loaded(bench: Bench, subject: Subject, found: Footprint | str, baseline: Baseline | None) -> Measured:
    from ..runtime import load

    model = load(subject.source, device=bench.where.id)
    beside = baseline.model if baseline else None
    errors: dict[str, Exception] = {}
    speeds: list[Speed] = []
    faster = scores = None
    try:
        speeds, *others = bench.time([model, *([beside] if beside is not None else [])], subject.name)
        if baseline and others:
            faster = baseline.saw(speeds, others[0])
        elif baseline:
            faster = baseline.beaten_by(speeds)
    except Exception as error:
        errors["speed"] = error
    try:
        scores = _score(bench, quality.model_logits(model, bench.tokens), baseline, _how(subject, baseline))
    except Exception as error:
        errors["quality"] = error
    if not speeds and scores is None:
        raise errors["speed"]
    how = IN_TURNS if beside is not None else ALONE
    problems = [f"{what}: {said(error)}" for what, error in errors.items()]
    run = facts.of_loaded(model)
    return bench.row(
        subject, run, found, speeds=speeds, speed_how=how, faster=faster, quality=scores, problems=problems
    )


def _streamed(bench: Bench, subject: Subject, found: Footprint | str, baseline: Baseline | None) -> Measured:
    streamed = bench.stream(subject)
    scores = _score(bench, streamed.logits(), baseline, _how(subject, baseline))
    return bench.row(subject, _run_of(streamed), found, speeds=(), speed_how=UNTIMED, quality=scores)


def _score(bench: Bench, logits: Generator[torch.Tensor, None, None], baseline: Baseline | None, how: str) -> Quality:
    # Closed even where scoring fails: a head that was read for it is then freed at once, not whenever.
    with track("quality", len(bench.tokens)) as advance, closing(logits) as ours:
        if baseline is None:
            found = quality.perplexity(ours, bench.tokens, advance)
        else:
            with closing(baseline.logits()) as theirs:
                found = quality.compare(theirs, ours, bench.tokens, advance)
    return replace(found, how=how)


def _how(subject: Subject, baseline: Baseline | None) -> str:
    if baseline is None:
        return "loaded" if subject.loaded else "streamed block by block"
    if subject.loaded:
        if baseline.model is not None:
            return "both loaded"
        return "loaded one after the other" if baseline.subject.loaded else "baseline streamed block by block"
    return "model streamed block by block" if baseline.subject.loaded else "both streamed block by block"


def _frame(subject: Subject, bench: Bench) -> Any:
    from ..runtime.frame import Frame

    return Frame(subject.source, bench.where.id)


def _run_of(streamed: Streamed) -> facts.Run:
    return facts.Run(streamed.weights, streamed.frame.dtype, streamed.kernels)


def said(error: Exception) -> str:
    """A failure in one line."""
    if isinstance(error, QkitError):
        return error.message
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return "out of memory"
    first = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first}"


def free(device: str) -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    process.give_back()
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()
