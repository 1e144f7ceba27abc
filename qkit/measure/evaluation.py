"""The text that quality is measured on: tokens that all models share, apart from what they were calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from . import facts
from .types import EvaluationText

if TYPE_CHECKING:
    import torch

    from ..text.read import Text
    from .options import Options
    from .room import Subject

# Share of the evaluated words that may stand in the calibration text, as licences, boilerplate and quotations do: a
# hundredth moves a mean by far less than its error, and one copied document in fifty is above it.
MOST_SHARED = 0.01
_PROBE = 20_000  # characters of the text with which tokenizers are compared


def prepare(
    models: Sequence[Subject], baseline: Subject | None, options: Options, n_ctx: int
) -> tuple[torch.Tensor, EvaluationText, tuple[Subject, ...]]:
    """(int64 tokens [chunks, n_ctx], what they are, the models with what is known of their overlap).

    Raises QkitError for a model without a tokenizer, for models that read text differently, for a text that is shorter
    than a chunk or that a model was calibrated on."""
    from ..runtime import load_tokenizer
    from ..text.defaults import evaluation_text
    from ..text.read import read_text
    from ..text.windows import token_windows

    _check_vocabularies([*models, *([baseline] if baseline else [])])
    tokenizer = load_tokenizer(models[0].source, options.trust_remote_code)
    named = evaluation_text() if options.text is None else read_text(options.text, tokenizer)
    for other in [*models[1:], *([baseline] if baseline else [])]:
        try:
            theirs = load_tokenizer(other.source, options.trust_remote_code)
        except QkitError:
            if other is not baseline:  # which may be weights alone
                raise
        else:
            _check_same(models[0], tokenizer, other, theirs, named.content[:_PROBE])
    tokens, prefix, bos = token_windows(named, tokenizer, options.chunks, n_ctx, allow_fewer=True)
    words = named.words(prefix)
    checked = tuple(replace(each, overlap=_overlap(each, named, words, options.allow_overlap)) for each in models)
    return tokens, EvaluationText(named.name, named.sha256, len(tokens), n_ctx, bos), checked


def _check_vocabularies(subjects: Sequence[Subject]) -> None:
    first = subjects[0]
    for other in subjects[1:]:
        if other.sizes.arch.vocab != first.sizes.arch.vocab:
            raise QkitError(
                f"the models have different vocabularies: {first.name} {first.sizes.arch.vocab} and {other.name} "
                f"{other.sizes.arch.vocab} tokens",
                "the baseline must be the model that was quantized",
            )


def _check_same(one: Subject, ours: Any, other: Subject, theirs: Any, probe: str) -> None:
    """Two tokenizers that give the probe the same ids may be of different files; and where they cut text differently,
    ids that stand for the same tokens still make predictions comparable."""
    ids = [tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"] for tokenizer in (ours, theirs)]
    if ids[0] == ids[1]:
        return
    used = sorted({*ids[0], *ids[1]})
    words = [tokenizer.convert_ids_to_tokens(used) for tokenizer in (ours, theirs)]
    different = next(((i, a, b) for i, a, b in zip(used, *words, strict=True) if a != b), None)
    if different is not None:
        token, a, b = different
        raise QkitError(
            f"{one.name} and {other.name} have different tokenizers: token {token} is {a!r} in one and {b!r} in the "
            "other, so that their predictions cannot be compared",
            "the baseline must be the model that was quantized",
        )


def _overlap(subject: Subject, named: Text, words: str, allowed: bool) -> str:
    """What is known of the evaluation text and a model's calibration text, in words."""
    from ..text.sketch import overlap

    identity, _ = facts.manifest(subject.source.folder)
    calibration = identity.get("calibration")
    if not identity:
        return "not checked: the model has no qkit manifest"
    if not isinstance(calibration, dict):
        return "nothing to check: the model was converted without calibration text"
    if not calibration.get("sketch"):
        return "not checked: the model's manifest holds no sketch of its calibration text"
    shared = overlap(calibration["sketch"], words)
    name = calibration.get("name")
    if shared.fraction > MOST_SHARED and not allowed:
        raise QkitError(
            f"the evaluation text {named.name} shares {shared.fraction:.1%} of its words with the text that "
            f"{subject.name} was calibrated on, for instance: {shared.example[:120]!r}",
            "evaluate on another text with --text FILE, or accept it, said in the report, with --allow-overlap",
        )
    if shared.fraction > MOST_SHARED:
        return f"OVERLAPS: {shared.fraction:.1%} of its words stand in the calibration text {name} (allowed)"
    if shared.count:
        return (
            f"checked: {shared.fraction:.2%} of its words stand in passages of 13 or more in common with the "
            f"calibration text {name}"
        )
    return f"checked: no passage of 20 or more words in common with the calibration text {name}"
