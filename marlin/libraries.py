"""The compiled libraries beside this file: what the build noted of them, and loading them."""

import json
import struct
from pathlib import Path

import torch

HERE = Path(__file__).parent


def load(name: str) -> None:
    """Loads ``name``.so into torch; an ImportError says why it does not."""
    path = HERE / f"{name}.so"
    if not path.exists():
        raise ImportError(
            f"marlin: {path} is missing: the package was not built. Expected it after "
            "`pip install .` or `pip install --no-build-isolation -e .`"
        )
    check_length(path)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"marlin: {path} does not load in torch {torch.__version__} (2.10 or newer is needed, "
            f"or a new build): {error.__cause__ or error}"
        ) from error


def check_length(path: Path) -> None:
    """Refuses a library that was cut short: to load it may end the process, without a word.

    A linker puts the table of sections last, and the header says where. What is no library at all
    is left to the loader, which has words for it.
    """
    with path.open("rb") as file:
        header = file.read(64)  # of an ELF file of 64 bits, little-endian
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_bytes, entries = struct.unpack_from("<HH", header, 58)
    expected, size = table + entry_bytes * entries, path.stat().st_size
    if size < expected:
        raise ImportError(
            f"marlin: {path} was cut short: expected at least {expected} bytes, got {size}. "
            "Install or build it again"
        )


def build_report() -> dict:
    """What this build holds: ``cuda`` (bool), ``why_no_cuda``, ``torch``, ``nvcc``, ``archs``."""
    path = HERE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {"cuda": False}
