"""Plain arrays out of published ``.pkl`` files, without running what else a pickle may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: All that a pickle of numpy arrays refers to, under the names that numpy had and has for it.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows arrays and refuses every other name, so that no code of the file's choice can run.

    A pickle acts only through the names that it asks for here; this is how ``torch.load(weights_only=True)`` works too.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, and only numpy arrays are accepted")
        return super().find_class(module, name)


def read_pickled_arrays(path: Path) -> tuple[NDArray, NDArray]:
    """Read a file that holds one pair of numeric arrays, such as (images, labels).

    Raises:
        ValueError: If it is truncated, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"'{path}' is truncated or not a pair of arrays ({error}).") from error
    arrays = tuple(content) if isinstance(content, (tuple, list)) else ()
    if len(arrays) != 2 or not all(isinstance(a, np.ndarray) and a.dtype.kind in "iuf" for a in arrays):
        raise ValueError(f"'{path}' must hold a pair of numeric arrays (images, labels).")
    return arrays[0], arrays[1]
