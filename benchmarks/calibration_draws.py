"""How far the draw of the calibration windows moves a GPTQ conversion's quality.

    python benchmarks/calibration_draws.py SOURCE [--calib FILE] [--text FILE] [--seeds N ...] [FOLDER ...]

One conversion for each seed of the windows and one with windows from the head of the text; then folders that were made
before. KL divergence from the source on the first 16 x 512 tokens of --text, with its standard error.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import qkit
from qkit.measure import quality
from qkit.measure.run import N_CTX
from qkit.runtime import load_tokenizer
from qkit.sources import open_source
from qkit.text import windows
from qkit.text.defaults import evaluation_text
from qkit.text.read import read_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("folder", nargs="*")
    parser.add_argument("--calib")
    parser.add_argument("--text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    args = parser.parse_args()

    tokenizer = load_tokenizer(open_source(args.source))
    text = evaluation_text() if args.text is None else read_text(args.text, tokenizer)
    tokens, _, _ = windows.token_windows(text, tokenizer, 16, N_CTX, allow_fewer=True)
    base = qkit.load(args.source)

    def show(what: str, folder: str | Path) -> None:
        logits = (quality.model_logits(model, tokens) for model in (base, qkit.load(folder)))
        scores = quality.compare(*logits, tokens)
        figures = ((name, each.against.kld) for name, each in scores.protocols.items() if each.against)
        print(what, *(f"{name} {kld.value:.4f} ± {kld.error:.4f}" for name, kld in figures), sep="  ", flush=True)

    spread = windows.spread
    for seed in [None, *args.seeds]:
        with tempfile.TemporaryDirectory() as scratch:
            windows.spread = (lambda *given: None) if seed is None else spread
            windows._SEED = seed or 0
            qkit.convert(args.source, Path(scratch, "out"), method="gptq", calib=args.calib)
            show("head" if seed is None else f"seed {seed}", Path(scratch, "out"))
    for folder in args.folder:
        show(folder, folder)


if __name__ == "__main__":
    main()
