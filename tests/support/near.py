"""Equality up to rounding beside the largest value, which is what the rounding errors of sums go by."""

from __future__ import annotations

from torch import Tensor


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, beside the largest value; NaN if there is one."""
    scale = expected.abs().max().item() or 1.0
    return (actual.double() - expected.double()).abs().max().item() / scale


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """No value is further from what is expected than `tolerance`, beside the largest value."""
    assert actual.shape == expected.shape
    difference = relative_difference(actual, expected)
    assert difference <= tolerance, f"values differ by {difference:.1e}"
