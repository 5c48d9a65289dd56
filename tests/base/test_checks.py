"""The messages for values that make no sense."""

import math

import pytest

from llmtrain.base import checks


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (checks.positive, [1e-9, 3, None], [0, -1, math.nan, math.inf]),
        (checks.non_negative, [0, 3, None], [-1e-9, math.nan, math.inf]),
        (checks.fraction, [0, 0.5, 1, None], [-0.1, 1.1, math.nan]),
    ],
)
def test_numbers_out_of_range_are_refused_by_key(check, good, bad):
    for value in good:
        check(key=value)
    for value in bad:
        with pytest.raises(ValueError, match=rf"^key={value}: must "):
            check(key=value)


def test_a_broken_regular_expression_is_named():
    checks.pattern("rules[0].pattern", r"blocks\.\d+\.")
    with pytest.raises(ValueError, match=r"^rules\[0\]\.pattern='\(': not a regular expression \(missing \)"):
        checks.pattern("rules[0].pattern", "(")


def test_a_pattern_without_match_is_refused_with_the_nearest_names():
    names = ["token_embedding.weight", *(f"blocks.{i}.{part}" for i in range(12) for part in ("attention", "norm"))]
    checks.pattern_matches("exclude[0]", r"blocks\.11\.", names)
    with pytest.raises(ValueError, match=r"^exclude\[0\]='atention': matches no parameter") as error:
        checks.pattern_matches("exclude[0]", "atention", names)
    assert "; the nearest are blocks.0.attention, " in str(error.value)
    assert "blocks.1." not in str(error.value)
