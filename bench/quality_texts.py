"""Text that every machine has, for `quality`: what it is calibrated with, what it is judged by."""

import ast
import functools
import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptq import calibration

SHORTEST_DOCUMENT = 2000  # characters of docstrings that make a module a document
CODE_LENGTH = 4000  # characters of a module
CODE_PACKAGES = ("email", "http", "multiprocessing", "urllib")
LICENCES = Path("/usr/share/common-licenses")
LICENCE_NAMES = ("Apache-2.0", "Artistic", "GPL-3", "MPL-2.0")


def docstrings() -> list[str]:
    """The standard library's docstrings, a document per module; nothing is imported."""
    documents = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(docstring for docstring in found if docstring)
        if len(text) >= SHORTEST_DOCUMENT:
            documents.append(text)
    return documents


def code() -> list[str]:
    """How modules of the standard library's packages begin, which ``docstrings`` leaves out."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for package in CODE_PACKAGES for path in sorted((library / package).glob("*.py"))]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return [text[:CODE_LENGTH] for text in texts if len(text) >= CODE_LENGTH]


def licences() -> list[str]:
    """Debian's. Raises ValueError where they are not."""
    if not LICENCES.is_dir():
        raise ValueError(f"--texts other: expected Debian's {LICENCES}, found nothing there")
    return [(LICENCES / name).read_text(encoding="utf-8") for name in LICENCE_NAMES]


@dataclass(frozen=True)
class Texts:
    """What a model is calibrated with, and what it is judged by: documents by domain."""

    calibration: list[str]
    judged: dict[str, list[str]]


def usual_texts() -> Texts:
    """Calibrates with topics of Python's reference; judges by its others, and by the standard
    library's docstrings, which calibration never sees."""
    return Texts(
        calibration.pydoc_topics(held_out=False),
        {"reference": calibration.pydoc_topics(held_out=True), "docstrings": docstrings()},
    )


def other_texts() -> Texts:
    """Judges by texts by which no default of the quantizer was chosen; docstrings calibrate."""
    return Texts(docstrings(), {"licences": licences(), "code": code()})


TEXTS = {"usual": usual_texts, "other": other_texts}


@functools.cache
def texts(name: str) -> Texts:
    """Of TEXTS; what judges always in the same random order."""
    found = TEXTS[name]()
    for documents in found.judged.values():
        random.Random(0).shuffle(documents)
    return found


def glued(pieces: list[Tensor], seqlen: int) -> list[Tensor]:
    """The same tokens in the same order, but in samples of ``seqlen``, wherever documents end."""
    return list(torch.cat(pieces, dim=1).split(seqlen, dim=1))


def sentences(documents: list[str], count: int | None, seed: int) -> list[str]:
    """``count`` distinct sentences of 20 to 300 characters, or all there are."""
    found = set()
    for text in documents:
        for sentence in re.split(r"(?<=[.!?:])\s+|\n\n", text):
            sentence = " ".join(sentence.split())
            if 20 <= len(sentence) <= 300 and " " in sentence:
                found.add(sentence)
    few = len(found) if count is None else min(count, len(found))
    return random.Random(seed).sample(sorted(found), few)
