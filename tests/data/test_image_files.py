from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fl_lightning.data.image_files import ImageFiles, check_image, fit_square, read_image
from tests.data.made import write_image


def test_an_image_is_read_as_it_was_written(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 3, 6).permute(1, 2, 0).numpy(), pixels)
    grey = read_image(tmp_path / "a.png", 1, 6)
    assert grey.shape == (1, 6, 6)
    expected = pixels @ np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow documents
    assert np.abs(grey[0].numpy() - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_kinds_of_images_become_colour(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    assert (read_image(path, 3, 4) >= 254).all()


@pytest.mark.parametrize(
    ("name", "dtype", "mode"),
    [("a.png", "<u2", "I;16"), ("a.tif", "<u2", "I;16"), ("a.tif", "<i4", "I"), ("a.tif", "<f4", "F")],
)
def test_grey_values_of_more_than_8_bits_are_refused(tmp_path: Path, name: str, dtype: str, mode: str) -> None:
    Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(dtype)).save(tmp_path / name)
    for channels in (1, 3):
        with pytest.raises(
            ValueError, match=rf"{name}' has more than 8 bits .*mode {mode}\).* with 8 bits per channel"
        ) as e:
            read_image(tmp_path / name, channels, 8)
        assert "truncated" not in str(e.value)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[0] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png", 3, 4)
    assert (image[:, :, 3] == 200).all()
    assert (image[:, :, :3] == 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_becomes_white(tmp_path: Path, channels: int) -> None:
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, :, 3] = 255, 128
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", channels, 2)[0].tolist() == [[0, 127], [255, 255]]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "webp", "tif"])
def test_a_check_finds_what_reading_would_find(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    check_image(path)
    for kept in (0, 10, len(content) // 2, len(content) - 60):
        path.write_bytes(content[:kept])
        for look in (check_image, partial(read_image, channels=3, image_size=8)):
            with pytest.raises(ValueError, match=f"a.{ending}' is truncated or not an image"):
                look(path)


def test_a_decompression_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(tmp_path / "a.png", width=64, height=64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="a.png' is truncated or not an image .*decompression bomb"):
        read_image(path, 3, 8)


def test_crop_keeps_the_centre_and_squash_keeps_all() -> None:
    image = torch.zeros(1, 4, 12, dtype=torch.uint8)
    image[..., :4], image[..., 4:8], image[..., 8:] = 10, 20, 30
    assert (fit_square(image, 4, "crop") == 20).all()
    squashed = fit_square(image, 4, "squash")
    assert squashed[0, 0, 0] < 15
    assert squashed[0, 0, 3] > 25


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no image file .*a.png"):
        read_image(tmp_path / "a.png", 3, 4)
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"a.png' is truncated or not an image"):
        read_image(tmp_path / "a.png", 3, 4)
    with pytest.raises(FileNotFoundError, match=r"there is no image file .*b.png"):
        ImageFiles(["b.png"], torch.zeros(1).long(), tmp_path)
    with pytest.raises(ValueError, match="got 1 files and 2 labels"):
        ImageFiles(["b.png"], torch.zeros(2).long(), tmp_path)


def test_fingerprint_follows_names_sizes_and_labels(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)

    def fingerprint(paths: list[str], labels: list[int]) -> str:
        return ImageFiles(paths, torch.tensor(labels), tmp_path).fingerprint()

    first = fingerprint(["a.png", "b.png"], [0, 1])
    assert fingerprint(["a.png", "b.png"], [0, 1]) == first
    assert fingerprint(["a.png", "b.png"], [0, 0]) != first
    assert fingerprint(["b.png", "a.png"], [0, 1]) != first
    write_image(tmp_path / "a.png", 1, width=100)
    assert fingerprint(["a.png", "b.png"], [0, 1]) != first
