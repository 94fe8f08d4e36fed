"""Which row of a comparison is in bold: scipy's paired t-test says whether it is above the others."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import ttest_rel

from fl_lightning.comparison.table import SCORES, beyond_others


def rows(**scores: list[float | None]) -> dict[str, list[dict[str, Any]]]:
    return {name: [dict.fromkeys(SCORES, value) for value in values] for name, values in scores.items()}


@pytest.mark.parametrize("gap", [0.03, 0.004])
def test_a_row_is_in_bold_only_beyond_what_seeds_give(gap: float) -> None:
    low, lower = [0.50, 0.61, 0.55, 0.58], [0.40, 0.52, 0.43, 0.49]
    high = [value + gap + noise for value, noise in zip(low, (0.002, -0.002, 0.004, 0.0), strict=True)]
    values = rows(low=low, high=high, lower=lower)
    sure = all(2 * ttest_rel(high, other).pvalue < 0.05 for other in (low, lower))
    assert sure == (gap == 0.03)
    assert beyond_others(values) == (dict.fromkeys(SCORES, [1]) if sure else {})


def test_nothing_is_in_bold_of_one_seed_or_where_seeds_are_missing() -> None:
    assert beyond_others(rows(one=[0.9], other=[0.1])) == {}
    assert beyond_others(rows(one=[0.9, 0.91, 0.92], other=[None, 0.1, 0.1])) == {}
    assert beyond_others(rows(one=[0.9, 0.91, 0.92])) == {}
