"""Values of options that are written in a way of their own: numbers with units, JSON objects."""

from __future__ import annotations

import json
import re
from typing import Any

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def whole_number(option: str, text: str) -> int:
    """A number of at least 1, perhaps with a unit: 512, 10k, 1M, 50G.

    Raises:
        ValueError: it is none.
    """
    if (number := _number(text)) is None:
        raise ValueError(f"{option} is {text!r}; write a whole number of at least 1, as 512, 10k, 1M or 50G.")
    return number


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers of a comma-separated list, each as in `whole_number`.

    Raises:
        ValueError: one is none.
    """
    numbers = [_number(word) for word in text.split(",")]
    if None in numbers:
        raise ValueError(f"{option} is {text!r}; write whole numbers of at least 1, separated by commas: 128,10k,1M.")
    return [number for number in numbers if number is not None]


def _number(text: str) -> int | None:
    match = re.fullmatch(r"([0-9]+)([kMG]?)", text.strip())
    return int(match[1]) * UNITS[match[2]] or None if match else None


def json_object(option: str, text: str) -> dict[str, Any]:
    """Raises: ValueError: it is none."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} is {text!r}, which is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f'{option} is {text!r}; write an object: {{"enable_prefix_caching": false}}.')
    return found
