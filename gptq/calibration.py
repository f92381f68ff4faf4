"""Calibration text: where it comes from, and how it becomes samples.

A source is a list of documents. Each document is cut into samples of at most ``seqlen`` tokens and
keeps its own end, so samples have their natural lengths: nothing is glued together or padded.
"""

import hashlib
import json
import random
from pathlib import Path

import torch
from torch import Tensor

BUILTIN = "pydoc"
# Shorter samples say little and start with the odd activations of a first token.
SHORTEST_SAMPLE = 16
# Enough for the second moments of k inputs to be well known, and no more than 128 × 2048: beyond,
# seconds grow and losses hardly fall.
TOKENS_PER_INPUT = 50
MOST_TOKENS = 128 * 2048
# Every so many topics of Python's reference, in alphabetical order, one is held out.
HOLD_OUT_EVERY = 4


def pydoc_topics(held_out: bool) -> list[str]:
    """Topics of Python's own language reference, which every Python carries.

    Every fourth topic is held out for evaluation. Topics quote one another at length, so what
    a held-out topic says is also removed, paragraph by paragraph, from the calibration topics.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held = [topics[name] for name in names[::HOLD_OUT_EVERY]]
    if held_out:
        return held
    secret = {paragraph.strip() for text in held for paragraph in text.split("\n\n")}
    rest = [topics[name] for i, name in enumerate(names) if i % HOLD_OUT_EVERY]
    return ["\n\n".join(p for p in text.split("\n\n") if p.strip() not in secret) for text in rest]


def read_documents(source: str) -> list[str]:
    """The documents of a calibration source.

    source: ``pydoc`` (``pydoc_topics``), a text file (one document), a ``.jsonl`` file (one
    document per line, in its field "text"), or a dataset for the ``datasets`` package, written
    NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, of which the column "text" is read.
    Raises ValueError when the source does not exist or holds no text.
    """
    if source == BUILTIN:
        documents = pydoc_topics(held_out=False)
    elif Path(source).is_file():
        documents = _read_file(Path(source))
    else:
        documents = _read_dataset(source)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise ValueError(f"calibration: expected text in {source!r}, found none")
    return documents


def samples(
    documents: list[str],
    tokenizer,
    nsamples: int | None,
    seqlen: int,
    seed: int = 0,
    *,
    tokens: int | None = None,
) -> list[Tensor]:
    """Cut documents into samples, shuffle, keep some: a list of int64 (1, length).

    tokenizer: any Hugging Face tokenizer; the special tokens it puts around a text go around every
    sample. nsamples, tokens: as many samples, or as hold that many tokens, for which the last one
    is cut, whichever is reached first; None for no limit. Fewer come back when the text has no
    more; a text too short for one sample raises ValueError.
    """
    pieces = [piece for text in documents for piece in windows(text, tokenizer, seqlen)]
    shortest = min(SHORTEST_SAMPLE, seqlen)
    fitting = [piece for piece in pieces if piece.shape[1] >= shortest]
    if not fitting:
        raise ValueError(
            f"calibration: expected at least {shortest} tokens in one document, "
            f"got at most {max(piece.shape[1] for piece in pieces)}"
        )
    random.Random(seed).shuffle(fitting)
    return leading(fitting[:nsamples], tokens)


def leading(pieces: list[Tensor], tokens: int | None) -> list[Tensor]:
    """The first pieces, the last one cut, that together hold ``tokens`` tokens; or all of them."""
    if tokens is None:
        return pieces
    kept, room = [], tokens
    for piece in pieces:
        if room <= 0:
            break
        kept.append(piece[:, :room])
        room -= piece.shape[1]
    return kept


def default_tokens(widest: int) -> int:
    """How many calibration tokens a model deserves whose widest linear reads ``widest`` inputs."""
    return min(TOKENS_PER_INPUT * widest, MOST_TOKENS)


def digest(samples: list[Tensor]) -> str:
    """Tells whether two runs calibrate with the same tokens in the same order."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(str(tuple(sample.shape)).encode() + sample.numpy().tobytes())
    return total.hexdigest()


def windows(text: str, tokenizer, seqlen: int) -> list[Tensor]:
    """One document as consecutive (1, ≤ seqlen) int64 windows, special tokens around each.

    Raises ValueError when the special tokens alone fill a window.
    """
    prefix, suffix = special_tokens(tokenizer)
    room = seqlen - len(prefix) - len(suffix)
    if room < 1:
        raise ValueError(
            f"seqlen: expected more than the {len(prefix) + len(suffix)} special tokens "
            f"around a sample, got {seqlen}"
        )
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return [
        torch.tensor([prefix + tokens[start : start + room] + suffix])
        for start in range(0, len(tokens), room)
    ]


def special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text, found by looking at one."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []  # a template that rewrites the text itself: do without


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8: {error}") from error
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            documents.append(str(json.loads(line)["text"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: expected a JSON object with a field "text", got {line[:60]!r}'
            ) from error
    return documents


def _read_dataset(source: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"calibration: {source!r} is not a file; for a dataset, pip install datasets"
        ) from error
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise ValueError(f"calibration: expected NAME[:CONFIG][:SPLIT], got {source!r}")
    split = rest.pop() if rest else "train"
    try:
        rows = load_dataset(name, *rest, split=split)
    except Exception as error:  # datasets raises a dozen unrelated types for "cannot find it"
        raise ValueError(f"calibration: {source!r} is no file and no dataset: {error}") from error
    if "text" not in rows.column_names:
        raise ValueError(
            f'calibration: expected a column "text" in {source!r}, got {rows.column_names}'
        )
    return list(rows["text"])
