"""Results of slow steps, kept in a folder each until what they were made from changes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = "result.json"


def cached(folder: Path, key: dict, make: Callable[[], dict]) -> tuple[dict, bool]:
    """``make()``'s result, or the one in ``folder`` if it was made for the same ``key``.

    Returns (result, whether it was there already). An interrupted step leaves no result behind.
    """
    path = folder / RESULT
    key = json.loads(json.dumps(key))  # tuples and lists read back alike
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return kept["result"], True
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    result = make()
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"key": key, "result": result}, indent=1))
    temporary.rename(path)
    return result, False


def fingerprint(*packages: str) -> str:
    """Of the code that a result depends on: Python sources and built libraries."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".so"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]
