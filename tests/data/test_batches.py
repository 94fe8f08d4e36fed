from __future__ import annotations

import pytest

from fl_lightning.data.batches import batch_sizes


@pytest.mark.parametrize(
    ("num_examples", "drop_last", "avoid_single", "expected"),
    [
        (0, False, True, []),
        (8, False, True, [4, 4]),
        (10, False, True, [4, 4, 2]),
        (10, True, True, [4, 4]),
        (9, False, False, [4, 4, 1]),
        (9, False, True, [4, 5]),
        (9, True, True, [4, 4]),
        (3, True, True, [3]),  # smaller than a batch: one batch, never none
        (1, True, True, [1]),
        (5, False, True, [5]),
    ],
)
def test_batch_sizes(num_examples: int, drop_last: bool, avoid_single: bool, expected: list[int]) -> None:
    assert batch_sizes(num_examples, 4, drop_last, avoid_single) == expected


def test_batches_of_one_are_as_wished() -> None:
    assert batch_sizes(3, 1, avoid_single=True) == [1, 1, 1]
