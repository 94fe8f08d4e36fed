"""Arrays of images and labels from files, checked before anything is done with them. Nothing is ever unpickled."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from fl_lightning.checks import at_least, one_of, within
from fl_lightning.data.image_files import fit_square
from fl_lightning.data.pools import TrainTest

ARRAY_NAMES = ("x_train", "y_train", "x_test", "y_test")
VAL_NAMES = ("x_val", "y_val")

#: Most classes that a data set may have.
MAX_CLASSES = 1_000_000

_CHUNK = 1024  # images resized at a time: resizing works in floats, four times the bytes


def read_npz(path: Path | str) -> dict[str, NDArray[Any]]:
    """Read ``x_train, y_train, x_test, y_test``, and ``x_val, y_val`` if there are, from an ``.npz`` file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'; it must hold the arrays {', '.join(ARRAY_NAMES)}.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            wanted = ARRAY_NAMES + (VAL_NAMES if {*VAL_NAMES} & {*archive.files} else ())
            missing = [name for name in wanted if name not in archive.files]
            if missing:
                raise KeyError(
                    f"'{path}' lacks {', '.join(missing)}; it must hold {', '.join(wanted)}, and holds "
                    f"{', '.join(archive.files) or 'nothing'}"
                )
            arrays = {name: archive[name] for name in wanted}
        if no_array := next((name for name in wanted if not isinstance(arrays[name], np.ndarray)), None):
            raise TypeError(f"{no_array} is no array")
        return arrays
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, MemoryError, TypeError) as error:
        raise ValueError(
            f"'{path}' is truncated or not an .npz of plain arrays ({error}); copy or write it again."
        ) from error


def read_train_test_npz(
    path: Path, num_classes: int | None = None, channels: int | None = None, resize: int | None = None
) -> TrainTest:
    """Read the images and labels of one ``.npz``, see :func:`read_npz`.

    Args:
        path: The file.
        num_classes: What labels must be below, if known.
        channels: 1 or 3; ``None`` keeps what there is.
        resize: Height and width in pixels; ``None`` keeps what there is.
    """
    arrays = read_npz(path)
    parts: dict[str, Tensor] = {}
    for x, y in zip(list(arrays)[::2], list(arrays)[1::2], strict=True):
        parts[x] = image_tensor(arrays[x], f"{x} of '{path}'", channels, resize)
        parts[y] = label_tensor(arrays[y], len(parts[x]), f"{y} of '{path}'", num_classes)
        check_shape(parts[x], f"{x} of '{path}'", parts["x_train"], "x_train")
    return TrainTest(**parts)


def check_shape(images: Tensor, where: str, others: Tensor, those: str) -> None:
    """Raise unless two tensors hold images of one shape."""
    if images.shape[1:] != others.shape[1:]:
        raise ValueError(
            f"{where} has images of shape {tuple(images.shape[1:])} (channels, height, width), but {those} has "
            f"{tuple(others.shape[1:])}; data.channels and data.resize make them equal"
        )


def image_tensor(array: NDArray[Any], where: str, channels: int | None = None, resize: int | None = None) -> Tensor:
    """Bring an array of images into the form of a pool.

    Args:
        array: uint8, (N, H, W) grey, or (N, H, W, C) with C of 1 or 3.
        where: What it is called in error messages.
        channels: 1 or 3; grey images are repeated for 3. ``None`` keeps what is there.
        resize: Height and width in pixels. ``None`` keeps what is there.

    Returns:
        uint8, (N, C, H, W), contiguous.
    """
    if array.dtype != np.uint8:
        raise TypeError(
            f"{where} must be images of dtype uint8 with values 0 to 255, got {array.dtype}; rows of numbers are for "
            "data=table."
        )
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise ValueError(
            f"{where} must have the shape (N, height, width), or (N, height, width, channels) with 1 or 3 channels, "
            f"got {array.shape}."
        )
    return conform(torch.from_numpy(array).permute(0, 3, 1, 2), where, channels, resize)


def conform(images: Tensor, where: str, channels: int | None = None, resize: int | None = None) -> Tensor:
    """Bring uint8 images (N, C, H, W) to a number of channels and a square size. See :func:`image_tensor`."""
    one_of("channels", channels, (None, 1, 3))
    at_least("resize", resize, 1, or_null=True)
    height, width = images.shape[-2:]
    if resize is None and height != width:
        raise ValueError(f"{where} has images of {height}x{width} pixels, which are not square; set `resize`.")
    if channels == 1 and images.shape[1] == 3:
        images = vision.rgb_to_grayscale(images)
    if resize is not None and (height, width) != (resize, resize):
        images = torch.cat([fit_square(chunk, resize) for chunk in images.split(_CHUNK)])
    if channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images.contiguous()


def label_tensor(array: NDArray[Any], num_images: int, where: str, num_classes: int | None = None) -> Tensor:
    """Bring an array of labels into the form of a pool.

    Args:
        array: Integers, (N,), from 0.
        num_images: N.
        where: What it is called in error messages.
        num_classes: If known, what labels must be below.

    Returns:
        int64, (N,).
    """
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{where} must be whole numbers, got {array.dtype}; other targets go in with data=modules.")
    if array.shape != (num_images,):
        raise ValueError(f"{where} must hold one label per image, shape ({num_images},), got {array.shape}.")
    if num_images:
        least, most = int(array.min()), int(array.max())
        if least < 0:
            raise ValueError(f"{where} holds the label {least}; labels count from 0.")
        if num_classes is not None and most >= num_classes:
            raise ValueError(
                f"{where} holds the label {most}, outside the {num_classes} classes 0 to {num_classes - 1}."
            )
    return torch.from_numpy(array.astype(np.int64))


def class_names_of(classes: int | Sequence[str] | None, labels: Sequence[Tensor]) -> list[str]:
    """Names of the classes, from the configuration or counted from the training labels.

    Args:
        classes: Their number or names, or ``None`` to count.
        labels: All training labels.

    Raises:
        ValueError: If they must be counted and a number in between never occurs: the highest label then says nothing.
    """
    if isinstance(classes, int):
        within("classes", classes, f"[2, {MAX_CLASSES}]")
        return [str(label) for label in range(classes)]
    if classes is not None:
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise ValueError(f"`classes` must be at least two different names, got {list(classes)}.")
        return [str(name) for name in classes]
    present = torch.cat(list(labels)).unique().tolist()
    if present != list(range(len(present))):
        raise ValueError(
            f"The classes cannot be counted, as the training labels are {_shortened(present)}, not all from 0 on; "
            "say how many there are with `classes`."
        )
    return [str(label) for label in present]


def _shortened(values: list[int]) -> str:
    return ", ".join(str(value) for value in (values if len(values) <= 8 else values[:7])) + (
        f", … {values[-1]}" if len(values) > 8 else ""
    )


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


def read_pickled_arrays(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read a file that holds one pair of numeric arrays, such as (images, labels)."""
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"'{path}' is truncated or not a pair of arrays ({error}).") from error
    arrays = tuple(content) if isinstance(content, (tuple, list)) else ()
    if len(arrays) != 2 or not all(isinstance(a, np.ndarray) and a.dtype.kind in "iuf" for a in arrays):
        raise ValueError(f"'{path}' must hold a pair of numeric arrays (images, labels).")
    return arrays[0], arrays[1]
