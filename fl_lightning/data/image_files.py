"""Images that stay on disk and are decoded when a batch needs them."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as vision
from typing_extensions import override

from fl_lightning.checks import at_least, one_of
from fl_lightning.data.batches import Batch, Batches
from fl_lightning.data.pools import ImagePool

Fit = Literal["crop", "squash"]

log = logging.getLogger(__name__)

#: What Pillow raises for a file that it cannot read.
_BROKEN = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError)

#: Endings that count as images when a folder is read.
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".jfif")


def read_image(path: Path | str, channels: int, image_size: int, fit: Fit = "crop") -> Tensor:
    """Decode an image file.

    Args:
        path: Any format that Pillow reads. EXIF data turn it upright, and what is transparent becomes white.
        channels: 1 for grey, 3 for colour.
        image_size: Height and width of the result, in pixels.
        fit: What to do with an image that is not square: ``"crop"`` resizes its shorter side and cuts the centre,
            ``"squash"`` resizes both sides.

    Returns:
        uint8, (channels, image_size, image_size).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, not an image, or of more than 8 bits per grey value.
    """
    try:
        with Image.open(path) as file:
            mode = file.mode
            # Pillow cuts the values of its grey modes of 16 and 32 bits (I, I;16, F) off at 255: all would be white.
            deep = mode.startswith(("I", "F"))
            pixels = None if deep else np.array(_upright_and_opaque(file).convert("L" if channels == 1 else "RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image file '{path}'") from None
    except _BROKEN as error:
        raise ValueError(f"'{path}' is truncated or not an image ({error}); replace or remove it") from error
    if pixels is None:
        raise ValueError(
            f"'{path}' has more than 8 bits per grey value (Pillow's mode {mode}), whose range is not known; "
            "scale it to 0 ... 255 and save it with 8 bits per channel."
        )
    image = torch.from_numpy(pixels)
    image = image.unsqueeze(0) if channels == 1 else image.permute(2, 0, 1)
    return fit_square(image, image_size, fit).contiguous()


def check_image(path: Path | str) -> None:
    """Raise unless a file seems to be a whole image, without decoding it where its format says where it ends."""
    try:
        with Image.open(path) as file:
            if file.format == "PNG":
                file.verify()  # check sums
            elif not (file.format in ("JPEG", "MPO") and _ends_like_a_jpeg(path)):
                file.load()
    except _BROKEN as error:
        raise ValueError(f"'{path}' is truncated or not an image ({error}); replace or remove it") from error


def _ends_like_a_jpeg(path: Path | str) -> bool:
    with open(path, "rb") as file:
        file.seek(-2, os.SEEK_END)
        return file.read() == b"\xff\xd9"


def _upright_and_opaque(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def fit_square(image: Tensor, image_size: int, fit: Fit = "crop") -> Tensor:
    """Bring an image (C, H, W), or a batch of them, to a square size. See :func:`read_image`."""
    height, width = image.shape[-2:]
    if height == width == image_size:
        return image
    if fit == "squash" or height == width:
        image = vision.resize(image, [image_size, image_size], antialias=True)
    else:
        image = vision.center_crop(vision.resize(image, [image_size], antialias=True), [image_size, image_size])
    return image


class ImageFiles:
    """Labels in memory, images on disk. It offers what :class:`~fl_lightning.data.pools.ImagePool` offers.

    Args:
        paths: Image files; relative to ``root``, where they are hashed by their relative names.
        labels: The classes, int64 (N,), or other targets (see :class:`~fl_lightning.data.pools.Pool`).
        root: The folder of the data set.
        channels: 1 or 3.
        image_size: Height and width to which each image is brought, in pixels.
        fit: See :func:`read_image`.
        num_workers: Processes that decode the images of a batch; 0 decodes in this one.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        root: Path | str,
        channels: int = 3,
        image_size: int = 224,
        fit: Fit = "crop",
        num_workers: int = 0,
    ) -> None:
        if len(paths) != len(labels):
            raise ValueError(f"labels must be one per image file, got {len(paths)} files and {len(labels)} labels")
        one_of("channels", channels, (1, 3))
        at_least("resize", image_size, 1)
        one_of("fit", fit, ("crop", "squash"))
        at_least("num_workers", num_workers, 0)
        self.root = Path(root)
        # One array of strings: a list would be a Python object per file, whose reference counts make every worker
        # process copy the memory it was forked with.
        self.paths = np.array(list(paths), dtype=str)
        self.labels = labels
        self.channels = channels
        self.image_size = image_size
        self.fit = fit
        self.num_workers = num_workers
        digest = hashlib.sha256()
        for path, label in zip(paths, labels.tolist(), strict=True):
            file = self.root / path
            if not file.is_file():
                raise FileNotFoundError(
                    f"there is no image file '{file}', which the data set lists; unpack the whole archive into "
                    f"'{self.root}'"
                )
            line = f"{Path(path).as_posix()}\0{file.stat().st_size}\0{label}\n"
            try:
                digest.update(line.encode())
            except UnicodeEncodeError:
                raise ValueError(f"the name of the file {ascii(str(file))} is not UTF-8; rename it") from None
        self._fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image, decoded."""
        return self.channels, self.image_size, self.image_size

    @property
    def num_bytes(self) -> int:
        """Bytes that the decoded images would take."""
        return len(self) * prod(self.shape)

    def read(self, index: int) -> Tensor:
        """Decode one image: uint8 (C, H, W)."""
        return read_image(self.root / str(self.paths[index]), self.channels, self.image_size, self.fit)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Decode some examples: uint8 (n, C, H, W) and labels int64 (n,)."""
        images = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        for position, index in enumerate(indices.tolist()):
            images[position] = self.read(index)
        return images, self.labels[indices]

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and labels. The pixels are not read: that would take as long as an epoch."""
        return self._fingerprint

    def check(self) -> None:
        """Raise unless each file seems to be a whole image, see :func:`check_image`."""
        log.info("checking %d image files in '%s'", len(self), self.root)
        for path in self.paths:
            check_image(self.root / str(path))

    def decode(self) -> ImagePool:
        """Decode everything into memory."""
        images, labels = self.gather(torch.arange(len(self)))
        return ImagePool(images, labels)


class _DecodedFiles(Dataset[Batch | Exception]):
    """What a worker process of the data loader runs. It returns its errors, as torch would add its own traceback."""

    def __init__(self, files: ImageFiles, batches: Sequence[Tensor]) -> None:
        self.files = files
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch | Exception:
        try:
            return self.files.gather(self.batches[number])
        except (ValueError, OSError) as error:
            return error


class FileBatches(Batches[ImageFiles]):
    """Batches of one client out of image files, decoded by the workers of a torch ``DataLoader``.

    Workers decode and resize; augmentation and normalisation run here on whole batches, as they do for a pool.

    For arguments see :class:`~fl_lightning.data.batches.Batches`; the source is an :class:`ImageFiles`.
    """

    @override
    def _epoch_batches(self, order: Tensor, generator: torch.Generator | None) -> Iterator[Batch]:
        with warnings.catch_warnings():
            # Torch compares with the cores of this machine; how many workers are wanted is the configuration's choice.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                _DecodedFiles(self.source, order[: sum(self.sizes)].split(self.sizes)),
                batch_size=None,
                num_workers=self.source.num_workers,
                pin_memory=torch.cuda.is_available(),
                # Without a generator of its own a DataLoader draws from the global one, which would let the order of
                # clients change everything that is drawn afterwards.
                generator=torch.Generator(),
            )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield self.prepare(batch[0], generator), batch[1]
