"""One .npz of one's own, and files that are not what they should be."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fl_lightning.data.partitioners import Iid
from fl_lightning.data.sets.folder import Folder
from fl_lightning.data.sets.npz import Npz
from fl_lightning.data.sets.torchvision_sets import TorchvisionSet
from tests.data.made import sizes, write_npz


def test_one_file_is_divided_among_clients(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "mine.npz", 60, 30)
    data = Npz(root=str(path), num_clients=3, partitioner=Iid(), val_fraction=0.0)
    assert np.sum(sizes(data), axis=0).tolist() == [60, 0, 30]
    assert (data.name, data.class_names) == ("mine", ["0", "1", "2"])
    assert Npz(root=str(path), num_clients=3, classes=["a", "b", "c"], partitioner=Iid()).class_names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="mine.npz' has labels up to 2, and emnist has .* 0 to 46; .*data=npz"):
        TorchvisionSet(name="emnist", root=str(path))
    with pytest.raises(ValueError, match="data.root must name the .npz"):
        Npz()


def test_validation_examples_of_a_client_are_used(tmp_path: Path) -> None:
    x, y = np.full((4, 8, 8, 3), 9, np.uint8), np.array([2, 1, 0, 2])
    write_npz(tmp_path / "ann.npz", 6, 3, x_val=x, y_val=y)
    write_npz(tmp_path / "bob.npz", 10, 3)
    data = Folder(root=str(tmp_path), val_fraction=0.2)
    assert sizes(data) == [(6, 4, 3), (8, 2, 3)]
    images, labels = data.clients[0].examples("val")
    assert (images == 9).all()
    assert labels.tolist() == y.tolist()
    with pytest.raises(ValueError, match="'ann' has x_val, .* put them into x_train"):
        Npz(root=str(tmp_path / "ann.npz"))
    write_npz(tmp_path / "ann.npz", 6, 3, x_val=x)
    with pytest.raises(ValueError, match="ann.npz' lacks y_val"):
        Folder(root=str(tmp_path))


def test_an_ending_in_capitals_is_an_ending(tmp_path: Path) -> None:
    write_npz(tmp_path / "ann.npz", 6, 3)
    write_npz(tmp_path / "bob.npz", 6, 3).rename(tmp_path / "BOB.NPZ")
    assert [client.name for client in Folder(root=str(tmp_path)).clients] == ["BOB", "ann"]
    write_npz(tmp_path / "BOB.npz", 6, 3)
    with pytest.raises(ValueError, match="more than one file for the client 'BOB'"):
        Folder(root=str(tmp_path))


def header(shape: tuple[int, ...]) -> bytes:
    """An .npy that promises an array and holds none."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("content", [header((10**12, 16, 16, 3)), header((9, 8, 8, 3)), b"just text"])
def test_a_member_that_is_no_array_is_named_with_its_file(tmp_path: Path, content: bytes) -> None:
    path = write_npz(tmp_path / "ann.npz", x_train=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", content)
    with pytest.raises(ValueError, match="ann.npz' is truncated or not an .npz of plain arrays"):
        Folder(root=str(tmp_path))


def test_labels_without_a_second_class_or_beyond_all_sense_are_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "ann.npz", y_train=np.full(6, 10**9), y_test=np.full(3, 10**9))
    with pytest.raises(ValueError, match=r"classes must lie in \[2, 1000000\], got 1000000001"):
        Folder(root=str(tmp_path), classes=10**9 + 1)
    write_npz(tmp_path / "ann.npz", y_train=np.zeros(6, int), y_test=np.zeros(3, int))
    for classes in (None, 10):
        with pytest.raises(ValueError, match="has the label 0 alone"):
            Folder(root=str(tmp_path), classes=classes)
