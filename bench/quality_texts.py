"""Text that every machine has, for `quality`: what it is calibrated with, what it is judged by."""

import ast
import random
import re
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from gptq import calibration

SHORTEST_DOCUMENT = 2000  # characters of docstrings that make a module a document


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


def domains() -> dict[str, list[str]]:
    """Held-out documents by domain, always in the same random order.

    reference: topics of Python's reference that calibration does not see, whose others it does.
    docstrings: the standard library's, which calibration never sees.
    """
    found = {"reference": calibration.pydoc_topics(held_out=True), "docstrings": docstrings()}
    for documents in found.values():
        random.Random(0).shuffle(documents)
    return found


def calibration_samples(tokenizer, tokens: int | None, seqlen: int, seed: int) -> list[Tensor]:
    """Samples of the reference's other topics, drawn by ``seed``: int64 (1, ≤ seqlen) each.

    The last one is cut so that they hold ``tokens`` tokens; None: all there are.
    """
    pieces = calibration.samples(
        calibration.pydoc_topics(held_out=False), tokenizer, 10**9, seqlen, seed
    )
    return pieces if tokens is None else leading(pieces, tokens)


def leading(pieces: list[Tensor], tokens: int) -> list[Tensor]:
    """The first pieces, the last one cut, that together hold ``tokens`` tokens, or all."""
    kept, room = [], tokens
    for piece in pieces:
        if room <= 0:
            break
        kept.append(piece[:, :room])
        room -= piece.shape[1]
    return kept


def glued(pieces: list[Tensor], seqlen: int) -> list[Tensor]:
    """The same tokens in the same order, but in samples of ``seqlen``, wherever documents end."""
    return list(torch.cat(pieces, dim=1).split(seqlen, dim=1))


def sentences(held_out: bool, count: int, seed: int) -> list[str]:
    """``count`` distinct sentences of 20 to 300 characters from Python's reference, or all."""
    found = set()
    for text in calibration.pydoc_topics(held_out):
        for sentence in re.split(r"(?<=[.!?:])\s+|\n\n", text):
            sentence = " ".join(sentence.split())
            if 20 <= len(sentence) <= 300 and " " in sentence:
                found.add(sentence)
    return random.Random(seed).sample(sorted(found), min(count, len(found)))
