"""Words as people type them: quotes taken off, and strings with line ends in them."""

from __future__ import annotations

import re

# A word, or what stands in quotes, as a whole or as the value in --option="value".
_WORD = re.compile(r"""\s*(--[\w-]+=)?(?:"([^"]*)"|'([^']*)'|([^\s"']+))(?=\s|$)""")


def split(text: str) -> list[str]:
    """The words of a line; quotes are taken off, and a backslash is one, as in a Windows path.

    Raises:
        ValueError: A quote is not closed, or is within a word.
    """
    found, end = [], 0
    text = text.rstrip()
    while end < len(text):
        word = _WORD.match(text, end)
        if word is None:
            raise ValueError("A quote is not closed, or is within a word")
        found.append("".join(part for part in word.groups() if part is not None))
        end = word.end()
    return found


_QUOTED = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)')(?=\s|$)""")


def leading(text: str) -> tuple[list[str], str]:
    """The quoted words that a line begins with, and the rest of the line."""
    found, end = [], 0
    while word := _QUOTED.match(text, end):
        found.append(word[1] if word[1] is not None else word[2])
        end = word.end()
    return found, text[end:]


def unescaped(text: str) -> str:
    r"""A stop string as it is typed: \n, \t and \\ are what they are in Python."""
    known = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: known[found[1]], text)
