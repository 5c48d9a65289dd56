"""Quantities as people read them."""

import math

import pytest

from llmtrain.base import format


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00k"),
        (12_345, "12.3k"),
        (12_000.0, "12.0k"),
        (999_499, "999k"),
        (999_600, "1.00M"),
        (124_439_808, "124M"),
        (1_557_611_200, "1.56B"),
        (3.2e15, "3.20e+03T"),
        (109.26, "109"),
        (0.25, "0.250"),
        (-12_345, "-12.3k"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_counts_are_written_with_separators_and_units(value: float, text: str) -> None:
    assert format.count(value) == text


def test_sizes_and_rates_have_three_digits_and_a_unit() -> None:
    assert format.size(512) == "512 B"
    assert format.size(1_493_000_000) == "1.49 GB"
    assert format.size(999_999_999) == "1.00 GB"
    assert format.rate(4.2e11, "FLOP/s") == "420 GFLOP/s"
    assert format.rate(9.89e14, "FLOP/s") == "989 TFLOP/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.0832, "83 ms"),
        (0.9999, "1.0 s"),
        (12.44, "12.4 s"),
        (12, "12 s"),
        (59.94, "59.9 s"),
        (59.96, "1m 00s"),
        (187, "3m 07s"),
        (3599.6, "1h 00m"),
        (3725, "1h 02m"),
        (86_399, "1d 00h"),
        (183_600, "2d 03h"),
        (math.inf, "inf"),
    ],
)
def test_durations_are_written_in_two_units(seconds: float, text: str) -> None:
    assert format.duration(seconds) == text


def test_losses_rates_and_norms_have_their_own_precision() -> None:
    assert format.loss(10.93398) == "10.9340"
    assert format.loss(math.nan) == "nan"
    assert format.loss(-math.inf) == "-inf"
    assert format.loss(123_456.0) == "1.235e+05"
    assert format.learning_rate(3e-4) == "3.0e-04"
    assert format.percent(0.3406) == "34.1%"
    assert [format.significant(value) for value in (0.0411, 1.8349, 123.4, 12_345.0, math.nan)] == [
        "0.0411",
        "1.83",
        "123",
        "1.23e+04",
        "nan",
    ]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("memory_bytes", 1_490_000_000, "1.49 GB"),
        ("seconds", 0.42, "420 ms"),
        ("val_loss", 3.25, "3.2500"),
        ("lr", 1e-3, "1.0e-03"),
        ("tokens", 1_234_567, "1,234,567"),
        ("grad_norm", 1.23456, "1.235"),
        ("clipped", True, "True"),
        ("path", "a\x1b[2J", r"a\x1b[2J"),
    ],
)
def test_the_key_names_the_unit(key: str, value: object, text: str) -> None:
    assert format.quantity(key, value) == text


def test_control_characters_are_made_visible() -> None:
    assert format.visible("\x1b[31mred\x07\r\x9b2J\x7f") == r"\x1b[31mred\x07\r\x9b2J\x7f"
    assert format.visible("\u202egnp.exe") == r"\u202egnp.exe"
    assert format.visible("lone \udcff") == r"lone \udcff"
    assert format.visible("a\tb\nc é 漢 🙂 [bold]") == "a\tb\nc é 漢 🙂 [bold]"
