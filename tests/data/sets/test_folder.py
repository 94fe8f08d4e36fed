from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_lightning.data.image_files import ImageFiles
from fl_lightning.data.pools import ImagePool
from fl_lightning.data.sets.folder import Folder
from tests.data.made import sizes, write_image, write_npz

IMAGES, LABELS = np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, int)


def npz_folder(root: Path) -> Path:
    write_npz(root / "ann.npz", 6, 3)
    write_npz(root / "bob.npz", 9, 4)
    return root


def image_folder(root: Path, levels: tuple[str, ...] = ("",)) -> Path:
    """Two clients with ten images of each of two classes; an image's grey value says its place."""
    value = 0
    for client in ("p", "q"):
        for level in levels:
            for name in ("cat", "dog"):
                for number in range(10):
                    write_image(root / client / level / name / f"{number}.png", value)
                    value = (value + 3) % 256
    return root


def test_one_client_per_npz(tmp_path: Path) -> None:
    data = Folder(root=str(npz_folder(tmp_path)), val_fraction=0.0)
    assert [(c.name, c.num_train, c.num_test) for c in data.clients] == [("ann", 6, 3), ("bob", 9, 4)]
    assert (data.num_classes, data.in_channels, data.image_size) == (3, 3, 8)
    assert data.name == tmp_path.name
    with np.load(tmp_path / "bob.npz") as arrays:
        images, labels = data.clients[1].examples("test")
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), arrays["x_test"])
        assert np.array_equal(labels.numpy(), arrays["y_test"])


def test_real_domains(real_data: Path) -> None:
    data = Folder(root=str(real_data / "digits5"), unseen_clients=["svhn"])
    assert [client.name for client in data.clients] == ["mnist", "mnist_m", "optdigits", "usps"]
    assert [client.name for client in data.unseen] == ["svhn"]
    assert [client.num_train + client.num_val for client in data.clients] == [1500, 1500, 1200, 1500]
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 3, 32)
    assert all((client.label_counts("test") == 50).all() for client in data.clients)


def test_grey_images_may_be_made_colour_and_resized(tmp_path: Path) -> None:
    grey = np.full((6, 10, 8), 7, dtype=np.uint8)
    write_npz(tmp_path / "ann.npz", x_train=grey, y_train=np.arange(6) % 2, x_test=grey, y_test=np.arange(6) % 2)
    with pytest.raises(ValueError, match="10x8 pixels, which are not square; set `resize`"):
        Folder(root=str(tmp_path))
    data = Folder(root=str(tmp_path), channels=3, resize=4)
    assert data.clients[0].examples("test")[0].shape == (6, 3, 4, 4)
    assert (data.clients[0].examples("test")[0] == 7).all()


def test_images_without_split_folders_are_split_class_by_class(tmp_path: Path) -> None:
    data = Folder(root=str(image_folder(tmp_path)), resize=8, test_fraction=0.3, val_fraction=0.0)
    assert data.class_names == ["cat", "dog"]
    for number, client in enumerate(data.clients):
        assert client.label_counts("train").tolist() == [7, 7]
        assert client.label_counts("test").tolist() == [3, 3]
        values = torch.cat([client.examples(split)[0][:, 0, 0, 0] for split in ("train", "test")])
        assert sorted(values.tolist()) == list(range(60 * number, 60 * (number + 1), 3))
    for images, labels in (client.examples("test") for client in data.clients):
        assert torch.equal(images[:, 0, 0, 0] // 30 % 2, labels.byte())


def test_train_and_test_folders_are_kept(tmp_path: Path) -> None:
    data = Folder(root=str(image_folder(tmp_path, ("train", "test"))), resize=8, val_fraction=0.0)
    assert [(client.num_train, client.num_test) for client in data.clients] == [(20, 20)] * 2
    assert data.clients[0].examples("train")[0][:, 0, 0, 0].tolist() == list(range(0, 60, 3))
    assert data.clients[0].examples("test")[0][:, 0, 0, 0].tolist() == list(range(60, 120, 3))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_on_disk_give_the_batches_of_images_in_memory(tmp_path: Path, num_workers: int) -> None:
    root = str(image_folder(tmp_path))
    memory = Folder(root=root, resize=4, in_memory=True, batch_size=5)
    disk = Folder(root=root, resize=4, in_memory=False, batch_size=5, num_workers=num_workers)
    before = torch.get_rng_state()
    for _ in range(2):
        loaders = [data.clients[1].train_dataloader() for data in (memory, disk)]
        assert isinstance(loaders[0].source, ImagePool)
        assert isinstance(loaders[1].source, ImageFiles)
        assert len(loaders[0]) == len(loaders[1])
        for (x, y), (other_x, other_y) in zip(*loaders, strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(memory.clients[0].examples("val")[0], disk.clients[0].examples("val")[0])
    assert not disk.to("cpu")


def test_large_folders_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(image_folder(tmp_path))
    assert isinstance(Folder(root=root, resize=4).clients[0].train_dataloader().source, ImagePool)
    monkeypatch.setattr("fl_lightning.data.federated_data.AUTO_BYTES", 40 * 3 * 16 - 1)
    assert isinstance(Folder(root=root, resize=4).clients[0].train_dataloader().source, ImageFiles)


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    data = Folder(root=str(npz_folder(tmp_path)))
    write_npz(tmp_path / "ann.npz", 6, 3, y_train=np.array([0, 1, 2, 0, 1, 1]))
    with pytest.raises(ValueError, match="the images or labels of"):
        data.partition.check_equal(Folder(root=str(tmp_path)).partition)


def test_a_moved_source_is_the_same(tmp_path: Path) -> None:
    one = Folder(root=str(image_folder(tmp_path / "a")), resize=8, in_memory=False)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one.partition.check_equal(Folder(root=str(tmp_path / "b"), resize=8, in_memory=False).partition)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x_train": np.zeros((6, 8, 8, 3))}, TypeError, "x_train of .*ann.npz' must be images of dtype uint8"),
        ({"x_train": np.zeros((6, 8, 8, 4), np.uint8)}, ValueError, r"1 or 3 channels, got \(6, 8, 8, 4\)"),
        ({"x_train": np.zeros((6, 64), np.uint8)}, ValueError, "x_train of .*ann.npz' must have the shape"),
        (
            {"x_test": np.zeros((3, 9, 9, 3), np.uint8)},
            ValueError,
            r"x_test of .*ann.npz' has .*\(3, 9, 9\) .* but x_train has \(3, 8, 8\)",
        ),
        ({"y_train": np.arange(6) / 2}, TypeError, "y_train of .*ann.npz' must be whole numbers, got float64"),
        ({"y_train": np.arange(5)}, ValueError, r"one label per image, shape \(6,\), got \(5,\)"),
        ({"y_train": np.eye(6, dtype=int)}, ValueError, "one label per image"),
        ({"y_train": np.arange(6) - 1}, ValueError, "y_train of .*ann.npz' holds the label -1"),
        (
            {"y_test": np.array([0, 1, 7])},
            ValueError,
            "y_test of .*ann.npz' holds the label 7, and no client",
        ),
        ({"y_train": np.array([0, 1, 2, 5, 0, 1])}, ValueError, "training labels are 0, 1, 2, 5.*`classes`"),
        ({"x_test": None}, ValueError, "ann.npz' lacks x_test; it must hold x_train, y_train, x_test, y_test"),
        (
            {"x_train": np.zeros((0, 8, 8, 3), np.uint8), "y_train": np.zeros(0, int)},
            ValueError,
            "'ann' must have at least 2 training examples, got 0",
        ),
        (
            {"x_train": np.zeros((1, 8, 8, 3), np.uint8), "y_train": np.zeros(1, int)},
            ValueError,
            "'ann' must have at least 2 training examples, got 1",
        ),
        (
            {"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)},
            ValueError,
            "'ann' must have a test example",
        ),
    ],
)
def test_bad_arrays(tmp_path: Path, changed: dict[str, np.ndarray], error: type[Exception], message: str) -> None:
    npz_folder(tmp_path)
    write_npz(tmp_path / "ann.npz", **changed)
    with pytest.raises(error, match=message):
        Folder(root=str(tmp_path))


def test_clients_of_different_channels(tmp_path: Path) -> None:
    npz_folder(tmp_path)
    grey = np.zeros((6, 8, 8), np.uint8)
    write_npz(tmp_path / "bob.npz", x_train=grey, y_train=np.arange(6) % 3, x_test=grey, y_test=np.arange(6) % 3)
    with pytest.raises(ValueError, match="x_train of .*bob.npz' has .*data.channels and data.resize make"):
        Folder(root=str(tmp_path))
    assert Folder(root=str(tmp_path), channels=3).in_channels == 3
    assert Folder(root=str(tmp_path), channels=1).in_channels == 1


def test_labels_beyond_the_stated_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="y_train of .*ann.npz' holds the label 2, outside the 2 classes 0 to 1"):
        Folder(root=str(npz_folder(tmp_path)), classes=2)
    assert Folder(root=str(tmp_path), classes=["x", "y", "z", "none"]).num_classes == 4


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    npz_folder(tmp_path)
    write_npz(tmp_path / "ann.npz", y_train=np.array([{}] * 6, dtype=object))
    with pytest.raises(ValueError, match="ann.npz' is truncated or not an .npz of plain arrays"):
        Folder(root=str(tmp_path))


@pytest.mark.parametrize("kept", [0, 10, 200, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path: Path, kept: float) -> None:
    npz_folder(tmp_path)
    content = (tmp_path / "ann.npz").read_bytes()
    (tmp_path / "ann.npz").write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(ValueError, match="ann.npz' is truncated or not"):
        Folder(root=str(tmp_path))


def test_damaged_bytes_within_a_file_are_noticed(tmp_path: Path) -> None:
    npz_folder(tmp_path)
    content = bytearray((tmp_path / "ann.npz").read_bytes())
    content[len(content) // 3] ^= 0xFF
    (tmp_path / "ann.npz").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="ann.npz'"):
        Folder(root=str(tmp_path))


def test_truncated_images_are_named(tmp_path: Path) -> None:
    image_folder(tmp_path)
    path = tmp_path / "p" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"p/cat/3.png' is truncated or not an image"):
        Folder(root=str(tmp_path), resize=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "image files; set data.resize"),
        ({"resize": 8, "classes": ["cat", "cow"]}, "has a folder 'dog', which is not among the classes cat, cow"),
        ({"resize": 8, "classes": 3}, "data.classes is 3, but .* has 2: cat, dog"),
        ({"resize": 8, "unseen_clients": ["r"]}, "`unseen_clients` names 'r', but the clients are p, q"),
        ({"resize": 8, "test_fraction": 0.0}, r"test_fraction must lie in \(0, 1\), got 0.0"),
        ({"resize": 8, "in_memory": "maybe"}, "in_memory must be one of true, false, auto, got 'maybe'"),
        ({"resize": 8, "channels": 2}, r"channels must be one of 1, 3, got 2"),
        ({"resize": 0}, "resize must be at least 1, got 0"),
        ({"resize": 8, "fit": "stretch"}, "fit must be one of crop, squash, got 'stretch'"),
        ({"resize": 8, "num_workers": -1}, "num_workers must be at least 0, got -1"),
    ],
)
def test_bad_image_settings(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Folder(root=str(image_folder(tmp_path)), **settings)  # type: ignore[arg-type]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.root must name the folder"):
        Folder()
    with pytest.raises(FileNotFoundError, match="there is no folder '.*nowhere'"):
        Folder(root=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="has no client: put one .npz per client"):
        Folder(root=str(tmp_path))
    image_folder(tmp_path, ("train",))
    with pytest.raises(ValueError, match="p' has a train folder and no test folder"):
        Folder(root=str(tmp_path), resize=8)
    npz_folder(tmp_path)
    with pytest.raises(ValueError, match="has both .npz files .*ann.npz.* and sub-folders"):
        Folder(root=str(tmp_path))


def test_empty_image_folders(tmp_path: Path) -> None:
    image_folder(tmp_path)
    (tmp_path / "q" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"q/cow' has no image"):
        Folder(root=str(tmp_path), resize=8)
    (tmp_path / "r").mkdir()
    (tmp_path / "q" / "cow").rmdir()
    with pytest.raises(ValueError, match=r"r' has no class folders"):
        Folder(root=str(tmp_path), resize=8)


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "val", "TEST")])
def test_splits_are_not_taken_for_clients(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_image(tmp_path / name / "cat" / "1.png")
    with pytest.raises(ValueError, match="has .* alone, which are splits and no clients; put .*/<client>/"):
        Folder(root=str(tmp_path), resize=8)


def test_a_val_folder_is_used_for_validation(tmp_path: Path) -> None:
    image_folder(tmp_path, ("Train", "test", "valid"))
    data = Folder(root=str(tmp_path), resize=8)
    assert sizes(data) == [(20, 20, 20)] * 2
    assert data.clients[0].examples("val")[0][:, 0, 0, 0].tolist() == list(range(120, 180, 3))
    write_image(tmp_path / "p" / "val" / "cat" / "1.png")
    with pytest.raises(ValueError, match="p' has Train, test, val, valid; keep one folder for each split"):
        Folder(root=str(tmp_path), resize=8)


def test_what_is_not_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_folder(tmp_path)
    Folder(root=str(tmp_path), resize=8)
    (tmp_path / "p" / "cat" / "._1.png").touch()
    assert not caplog.records
    (tmp_path / "p" / "cat" / "1.heic").touch()
    (tmp_path / "p" / "cat" / "2.jpg").symlink_to(tmp_path / "nowhere")
    write_image(tmp_path / "p" / "lost.png")
    Folder(root=str(tmp_path), resize=8)
    assert caplog.messages == [f"3 file(s) of '{tmp_path}' are ignored: p/cat/1.heic, p/cat/2.jpg, p/lost.png"]


def test_classes_that_differ_in_case_alone_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_folder(tmp_path)
    (tmp_path / "q" / "dog").rename(tmp_path / "q" / "Dog")
    assert Folder(root=str(tmp_path), resize=8).class_names == ["Dog", "cat", "dog"]
    assert "names differ in case alone: Dog, dog" in caplog.text


def test_names_that_are_not_unicode_are_refused(tmp_path: Path) -> None:
    image_folder(tmp_path)
    os.rename(tmp_path / "p" / "cat" / "3.png", os.fsencode(tmp_path) + b"/p/cat/\xff.png")
    with pytest.raises(ValueError, match=r"the name of the file '.*p/cat/.udcff.png' is not UTF-8; rename it"):
        Folder(root=str(tmp_path), resize=8)
    os.rename(tmp_path / "p", os.fsencode(tmp_path) + b"/\xfe")
    with pytest.raises(ValueError, match=r"the name of the client '.udcfe' is not UTF-8; rename it"):
        Folder(root=str(tmp_path), resize=8)


def test_images_on_disk_are_checked_at_once(tmp_path: Path) -> None:
    image_folder(tmp_path)
    path = tmp_path / "q" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="dog/0.png' is truncated or not an image"):
        Folder(root=str(tmp_path), resize=8, in_memory=False)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_breaks_later_is_one_sentence(tmp_path: Path, num_workers: int) -> None:
    data = Folder(root=str(image_folder(tmp_path)), resize=8, in_memory=False, num_workers=num_workers)
    for path in (tmp_path / "p" / "cat").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="p/cat/.*png' is truncated or not an image") as caught:
        list(data.clients[0].train_dataloader())
    assert "\n" not in str(caught.value)
