"""Regular expressions that come with a download, and must not keep us busy for years.

Python's try one way after the other through their repeats and alternatives. How many that may be
is bounded here before a text is matched; where it may be too many, the pattern is refused.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

try:
    from re import _constants as constants
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as constants
    import sre_parse as parser

MOST_WAYS = 2 * 10**7  # below a second
MOST_LETTERS = 10_000  # of a pattern
MOST_TIMES = 10_000  # that it asks for something


def match(pattern: str, text: str) -> bool:
    """Whether a text begins with what a pattern means.

    Raises re.error for what is no pattern, and for one that may take very long: with a choice
    inside of a repeat, as in (.+)+, or with many choices one after the other.
    """
    compiled, repeats, ways = read(pattern)
    if math.comb(len(text) + repeats, repeats) * ways > MOST_WAYS:
        raise re.error(f"may take very long on a name of {len(text)} letters")
    return compiled.match(text) is not None


@functools.lru_cache(maxsize=10_000)
def read(pattern: str) -> tuple[re.Pattern, int, int]:
    """A pattern, how many repeats it has that may go on, and how many ways lead through its
    alternatives."""
    if len(pattern) > MOST_LETTERS:
        raise re.error(f"expected a pattern of at most {MOST_LETTERS} letters, got {len(pattern)}")
    try:
        return re.compile(pattern), *choices(parser.parse(pattern))
    except (RecursionError, OverflowError) as error:
        raise re.error(str(error)) from error


def choices(tree, *, repeated: bool = False, times: int = 1) -> tuple[int, int]:
    """(repeats, ways) of a part of a pattern.

    repeated: whether it lies inside of a repeat. times: how often it comes at least.
    """
    repeats, ways = 0, 1
    for operation, argument in tree:
        repeat = str(operation).endswith("REPEAT")
        least, most = argument[:2] if repeat else (1, 1)
        if repeated and (least < most or operation is constants.BRANCH):
            raise re.error("a choice inside of a repeat, as in (.+)+, may take very long")
        if times * least > MOST_TIMES:
            raise re.error(f"asks for something {times * least} times")
        if operation is constants.BRANCH:
            ways *= alike(argument[1])
        elif most > 1 and least < most:
            repeats += 1
        elif least < most:
            ways *= 2
        for part in parts_of(argument):
            inside = repeated or most > 1
            more, others = choices(part, repeated=inside, times=times * max(least, 1))
            repeats, ways = repeats + more, ways * others
    return repeats, ways


def alike(alternatives: list) -> int:
    """How many of some alternatives one text can have the beginning of, at most."""
    first = [next(iter(part), None) for part in alternatives]
    letters = Counter(
        chr(item[1]).casefold() for item in first if item and item[0] is constants.LITERAL
    )
    return max(letters.values(), default=0) + len(first) - letters.total()


def parts_of(argument) -> Iterator:
    """The parts of a pattern that an operation's argument holds, wherever."""
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for item in argument:
            yield from parts_of(item)
