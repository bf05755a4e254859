"""Multiple-choice questions: choices put after a prompt under letters. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from string import ascii_uppercase


def lettered(prompt: str, choices: Sequence[str]) -> str:
    """The prompt, and each choice on a line of its own as "A) ..."."""
    lines = [f"{letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([prompt, "", *lines])


def shuffled(prompt: str, right: str, wrong: Sequence[str]) -> tuple[str, str]:
    """The prompt with its choices, and the right one's letter; a hash of prompt and choice decides the order, so that
    it stays when the data grows or is reordered, and no letter is right more often than chance.
    """
    choices = sorted([right, *wrong], key=lambda choice: hashlib.sha256(f"{prompt}\0{choice}".encode()).digest())
    return lettered(prompt, choices), ascii_uppercase[choices.index(right)]


def letter_of(answer: object, num_choices: int) -> str:
    """The letter of an answer that is a place from 0 (or its digits), or a letter already.

    Raises:
        ValueError: there is no such choice.
    """
    text = str(answer).strip().upper()
    letters = ascii_uppercase[:num_choices]
    if text.isdigit() and int(text) < num_choices:
        return letters[int(text)]
    if len(text) == 1 and text in letters:
        return text
    raise ValueError(f"{answer!r} is none of {num_choices} choices: neither a place from 0 nor a letter from A")
