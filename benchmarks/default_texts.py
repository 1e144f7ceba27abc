"""How the default texts in qkit/text/data were made: the language reference of CPython to calibrate on, docstrings of
its standard library to evaluate on, cleaned of markup.

    python benchmarks/default_texts.py OUT_FOLDER

They are shipped so that every machine has the same ones: another Python has other texts.
"""

from __future__ import annotations

import argparse
import ast
import lzma
import re
import sysconfig
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

from qkit.text.sketch import overlap, sketch

# Modules whose docstrings read as prose, present in every supported Python. Those that the language
# reference quotes at length (pdb, string) are left out; what is still shared is dropped by `overlap`.
_EVALUATION_MODULES = (
    "argparse.py", "asyncio/tasks.py", "codecs.py", "collections/__init__.py", "configparser.py", "difflib.py",
    "email/message.py", "fractions.py", "http/cookiejar.py", "inspect.py", "ipaddress.py", "json/__init__.py",
    "logging/__init__.py", "shutil.py", "smtplib.py", "socketserver.py", "statistics.py", "subprocess.py",
    "textwrap.py", "threading.py", "timeit.py", "traceback.py", "turtle.py", "urllib/parse.py", "wave.py",
)  # fmt: skip


def calibration_text() -> str:
    """The language reference behind `help()`, about 350 thousand characters."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts = []
    for topic in sorted(topics):
        for paragraph in paragraphs(topics[topic]):
            if paragraph not in seen:  # topics quote each other
                seen.add(paragraph)
                parts.append(paragraph)
    return "\n\n".join(parts) + "\n"


def evaluation_text(known: str) -> str:
    """Docstrings that share no passage with the text that `known` is the sketch of, about 270 thousand characters."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = [docstrings((root / m).read_bytes()) for m in _EVALUATION_MODULES if (root / m).is_file()]
    seen: set[str] = set()
    parts = []
    for docstring in chain.from_iterable(zip_longest(*modules, fillvalue="")):  # so that any prefix is varied
        cleaned = "\n\n".join(p for p in paragraphs(docstring) if p not in seen)
        seen.update(cleaned.split("\n\n"))
        if len(cleaned) >= 120 and overlap(known, cleaned).count == 0:
            parts.append(cleaned)
    return "\n\n".join(parts) + "\n"


def docstrings(source: bytes) -> Iterator[str]:
    """Docstrings of a module in source order; the module is parsed, never imported."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    for node in nodes:
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs without rst marks, prose unwrapped to one line each, code kept line by line."""
    for block in re.split(r"\n[ \t]*\n", text.expandtabs()):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        lines = [line for line in lines if re.search(r"\w", line) and "::=" not in line]  # rules, grammar
        if not lines:
            continue
        whole = " ".join(line.strip() for line in lines)
        sentence = re.match(r"(\* )?[A-Z]", whole) and whole.endswith((".", ":", ")"))
        table = any(re.search(r"\S {3,}\S", line) for line in lines)
        code = whole.startswith((">>>", "...")) or (lines[-1].startswith(" ") and not sentence)
        if len(lines) > 1 and (code or table):
            yield "\n".join(lines)
        else:
            prose = re.sub(r"(?<!\w)(\*{1,2}|`{1,2})(\w[^*`\n]*?)\1(?!\w)", r"\2", whole)  # *emphasis*, ``code``
            yield re.sub(r"::$", ":", prose)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    calibration = calibration_text()
    for name, text in (("calibration", calibration), ("evaluation", evaluation_text(sketch(calibration)))):
        (out / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        print(f"{name}: {len(text)} characters")


if __name__ == "__main__":
    main()
