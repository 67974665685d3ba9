"""Variables of the notebook in prompts: ``{name}`` and what lies under it, and no code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

_STEP = r"\.[A-Za-z_]\w*|\[(?:-?\d+|\"[^\"\]]*\"|'[^'\]]*')\]"
_FIELD = re.compile(
    r"""
    \{\{.*?\}\}                                       # doubled braces
    | \\[A-Za-z]+\*?(?:[_^]?(?:\[[^\]]*\]|\{[^{}]*\}))+  # LaTeX: \frac{a}{b}, \sum_{i}
    | (?<!\w)\w_\{[^{}]*\} | [\^$]\{[^{}]*\}          # LaTeX: x_{i}, x^{n}; a shell's ${x}
    | \b[rR]?[fF][rR]?(?:\"{3}.*?\"{3}|'{3}.*?'{3})     # Python: a long f-string
    | \b[rR]?[fF][rR]?(?:"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')  # Python: f"{x}"
    | \{([A-Za-z_]\w*)((?:"""
    + _STEP
    + r""")*)\}
    """,
    re.VERBOSE | re.DOTALL,
)


def interpolate(
    text: str, namespace: Mapping[str, Any], replaced: dict[str, None] | None = None
) -> str:
    """Put variables in the place of ``{name}``, ``{name.attr}``, ``{name[0]}``, ``{name["k"]}``.

    Nothing is evaluated. What names no variable stays as it is, and so do functions, classes and
    modules, doubled braces, f-strings, and braces of LaTeX and shells.

    Args:
        text: A prompt, or another word of a magic.
        namespace: The variables.
        replaced: Where the names of those that were put in are kept, in order.
    """

    def value(found: re.Match[str]) -> str:
        name, steps = found[1], found[2]
        if name is None or name not in namespace:
            return found[0]
        try:
            reached = _reached(namespace[name], steps)
            if _is_code(reached):
                return found[0]
            written = str(reached)
        except Exception:  # of a user's object, whose lookups run any code
            return found[0]
        if replaced is not None:
            replaced[name] = None
        return written

    return _FIELD.sub(value, text)


def _reached(value: Any, steps: str) -> Any:
    for step in re.findall(_STEP, steps):
        if step.startswith("."):
            value = getattr(value, step[1:])
        else:
            key = step[1:-1]
            value = value[key[1:-1] if key[0] in "\"'" else int(key)]
    return value


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, ModuleType)
