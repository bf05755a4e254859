"""A text with {answer} and {reference} in it: checked when a config is read, filled for each problem.

What is filled in is data: it is put in its place and never read as a template itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator

_MEANT = {"answer": "answer", "reference": "reference", "solution": "reference"}
"""What the name of a placeholder that does not exist may stand for."""

_PLACEHOLDER = re.compile(r"\{(answer|reference)\}")
_BRACED_WORD = re.compile(r"(?<![\w\\])\{\s*(\w+)\s*\}")
"""Behind a letter the braces are LaTeX's: \\text{solution}."""
_SIMILARITY = 0.7
"""difflib's ratio: a slip of the pen is above it, another word in braces (LaTeX has many) below."""


def check_wording(text: str) -> str:
    """`text` itself.

    Raises:
        ValueError: it is blank, or something in it is nearly a placeholder.
    """
    if not text.strip():
        raise ValueError(f"the text is {text!r}, which tells a teacher nothing")
    for braced in _BRACED_WORD.finditer(text):
        close = difflib.get_close_matches(braced[1].lower(), _MEANT, n=1, cutoff=_SIMILARITY)
        if close and not _PLACEHOLDER.fullmatch(braced[0]):
            raise ValueError(f"{braced[0]} is no placeholder; did you mean {{{_MEANT[close[0]]}}}?")
    return text


Wording = Annotated[str, AfterValidator(check_wording)]
"""A text that `check_wording` has passed."""


def fill(text: str, values: Mapping[str, str | None]) -> str:
    """`text` with every placeholder replaced by its value, in one pass.

    Raises:
        ValueError: a placeholder of `text` has no value.
    """

    def value_of(placeholder: re.Match[str]) -> str:
        value = values[placeholder[1]]
        if value is None:
            raise ValueError(f"no {placeholder[1]} to put in the place of {placeholder[0]}")
        return value

    return _PLACEHOLDER.sub(value_of, text)
