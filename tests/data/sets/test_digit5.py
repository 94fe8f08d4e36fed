"""Made files in the published layouts: the Digit-Five archive (.mat), the FedBN archive (.pkl), torchvision's files."""

from __future__ import annotations

import bz2
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from fl_lightning.data.readers import read_pickled_arrays
from fl_lightning.data.sets.digit5 import DOMAINS, Digit5

NUM = {"train": 30, "test": 20}


def images(seed: int, num: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def labels(num: int) -> np.ndarray:
    return np.arange(num) % 10


def write_mat_archive(root: Path) -> None:
    """Names, keys, shapes, types and label conventions of the Digit-Five archive."""
    one_hot = {part: np.eye(10)[labels(num)] for part, num in NUM.items()}
    column = {part: labels(num)[:, None] for part, num in NUM.items()}
    root.mkdir(parents=True, exist_ok=True)
    savemat(
        root / "mnist_data.mat",
        {f"{part}_32": images(1, num, 32, 32).astype(float) for part, num in NUM.items()}
        | {f"{part}_28": images(1, num, 28, 28, 1) for part, num in NUM.items()}
        | {f"label_{part}": one_hot[part] for part in NUM},
    )
    savemat(
        root / "mnistm_with_label.mat",
        {part: images(2, num, 28, 28, 3) for part, num in NUM.items()}
        | {f"label_{part}": one_hot[part] for part in NUM},
    )
    for part, num in NUM.items():
        y = np.where(labels(num) == 0, 10, labels(num))[:, None]
        savemat(root / f"svhn_{part}_32x32.mat", {"X": images(3, num, 32, 32, 3).transpose(1, 2, 3, 0), "y": y})
    savemat(
        root / "syn_number.mat",
        {f"{part}_data": images(4, num, 32, 32, 3) for part, num in NUM.items()}
        | {f"{part}_label": column[part] for part in NUM},
    )
    cells = np.empty((2, 2), dtype=object)
    for row, (part, num) in enumerate(NUM.items()):
        cells[row, 0] = images(5, num, 1, 28, 28) / 255
        cells[row, 1] = column[part]
    savemat(root / "usps_28x28.mat", {"dataset": cells})


def write_pickles(root: Path, protocol: int = pickle.HIGHEST_PROTOCOL) -> None:
    """Folders, files and shapes of the FedBN archive."""
    shapes = {
        "MNIST": (28, 28),
        "MNIST_M": (28, 28, 3),
        "SVHN": (32, 32, 3),
        "SynthDigits": (32, 32, 3),
        "USPS": (16, 16),
    }
    for seed, (folder, shape) in enumerate(shapes.items()):
        (root / folder).mkdir(parents=True)
        for part, num in NUM.items():
            with open(root / folder / f"{part}.pkl", "wb") as file:
                pickle.dump((images(seed, num, *shape), labels(num)), file, protocol)


@pytest.mark.parametrize("folder", ["", "Digit-Five"])
def test_digit_five_archive(tmp_path: Path, folder: str) -> None:
    write_mat_archive(tmp_path / folder)
    data = Digit5(root=str(tmp_path), val_fraction=0.0)
    assert [client.name for client in data.clients] == ["mnist", "mnist_m", "svhn", "synth", "usps"]
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 3, 32)
    for client in data.clients:
        x, y = client.examples("train")
        assert torch.equal(y, torch.from_numpy(labels(30)))
        assert x.shape == (30, 3, 32, 32)
    by_name = {client.name: client for client in data.clients}
    expected = {"mnist": images(1, 20, 32, 32)[:, None], "svhn": images(3, 20, 32, 32, 3).transpose(0, 3, 1, 2)}
    expected["synth"] = images(4, 20, 32, 32, 3).transpose(0, 3, 1, 2)
    for name, x in expected.items():
        assert np.array_equal(by_name[name].examples("test")[0].numpy(), np.broadcast_to(x, (20, 3, 32, 32)))
    assert by_name["usps"].examples("test")[0].float().mean() == pytest.approx(images(5, 20, 28, 28).mean(), abs=1)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_fedbn_archive(tmp_path: Path, protocol: int) -> None:
    write_pickles(tmp_path, protocol)
    data = Digit5(root=str(tmp_path), val_fraction=0.0)
    assert [(client.name, client.num_train, client.num_test) for client in data.clients] == [
        (name, 30, 20) for name in DOMAINS
    ]
    svhn = images(2, 30, 32, 32, 3).transpose(0, 3, 1, 2)
    assert np.array_equal(data.clients[2].examples("train")[0].numpy(), svhn)


def test_fedbn_archive_in_tenths(tmp_path: Path) -> None:
    """Its own loader reads ``partitions/train_part<n>.pkl``, so an archive may come without ``train.pkl``."""
    write_pickles(tmp_path)
    for folder in tmp_path.iterdir():
        x, y = read_pickled_arrays(folder / "train.pkl")
        (folder / "train.pkl").unlink()
        (folder / "partitions").mkdir()
        for part in range(10):
            with open(folder / "partitions" / f"train_part{part}.pkl", "wb") as file:
                pickle.dump((x[3 * part : 3 * part + 3], y[3 * part : 3 * part + 3]), file)
    data = Digit5(root=str(tmp_path), val_fraction=0.0)
    svhn = images(2, 30, 32, 32, 3).transpose(0, 3, 1, 2)
    assert np.array_equal(data.clients[2].examples("train")[0].numpy(), svhn)
    assert [client.num_test for client in data.clients] == [20] * 5


def test_torchvision_files_stand_in(tmp_path: Path) -> None:
    for file, num in (("usps.bz2", 30), ("usps.t.bz2", 20)):
        rows = [
            f"{label + 1} " + " ".join(f"{i + 1}:{value / 127.5 - 1:.5f}" for i, value in enumerate(image.ravel()))
            for image, label in zip(images(0, num, 16, 16), labels(num), strict=True)
        ]
        (tmp_path / file).write_bytes(bz2.compress("\n".join(rows).encode()))
    data = Digit5(root=str(tmp_path), domains=["usps"])
    assert data.clients[0].num_test == 20
    words = "put svhn_train_32x32.mat .* the folder SVHN .* 'svhn' is not complete .* put train_32x32.mat"
    with pytest.raises(FileNotFoundError, match=words):
        Digit5(root=str(tmp_path), domains=["usps", "svhn"])


def test_a_missing_domain_is_named_with_its_files(tmp_path: Path) -> None:
    write_mat_archive(tmp_path)
    (tmp_path / "syn_number.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"'synth' is missing: put syn_number.mat .* or the folder SynthDigits"):
        Digit5(root=str(tmp_path))


def test_fewer_images_are_kept_class_by_class_and_never_repeated(tmp_path: Path) -> None:
    write_mat_archive(tmp_path)
    data = Digit5(root=str(tmp_path), max_train=20, max_test=1000, val_fraction=0.0)
    for client in data.clients:
        assert client.label_counts("train").tolist() == [2] * 10
        assert client.num_test == 20
        assert len(np.unique(client.examples("test")[0].numpy(), axis=0)) == 20


def test_domains_are_chosen_ordered_and_held_out(tmp_path: Path) -> None:
    write_mat_archive(tmp_path)
    data = Digit5(root=str(tmp_path), domains=["usps", "synth", "mnist"], unseen_clients=["synth"])
    assert [client.name for client in [*data.clients, *data.unseen]] == ["usps", "mnist", "synth"]
    with pytest.raises(ValueError, match="`domains` names 'kmnist', but there are mnist, mnist_m, svhn, synth, usps"):
        Digit5(root=str(tmp_path), domains=["kmnist"])
    with pytest.raises(ValueError, match="max_test must be at least 1 or null, got 0"):
        Digit5(root=str(tmp_path), max_test=0)


@pytest.mark.parametrize("size", [0, 50, 1000, 5000])
def test_truncated_mat_files_are_named(tmp_path: Path, size: int) -> None:
    write_mat_archive(tmp_path)
    path = tmp_path / "mnistm_with_label.mat"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="mnistm_with_label.mat' .*Digit-Five archive"):
        Digit5(root=str(tmp_path), domains=["mnist_m"])


def test_foreign_mat_files_are_named(tmp_path: Path) -> None:
    savemat(tmp_path / "syn_number.mat", {"data": np.zeros(3)})
    with pytest.raises(ValueError, match=r"syn_number.mat' has no array 'train_data'"):
        Digit5(root=str(tmp_path), domains=["synth"])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.unlink, (Path(EVIL_TARGET),))  # type: ignore[return-value]


EVIL_TARGET = "target"


def test_pickles_of_anything_but_arrays_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.pkl"
    target = tmp_path / "target"
    target.touch()
    monkeypatch.setitem(globals(), "EVIL_TARGET", str(target))
    for content, message in (
        (Evil(), "only numpy arrays are accepted"),
        ((images(0, 2, 4, 4), Evil()), "only numpy arrays are accepted"),
        ((images(0, 2, 4, 4), np.array([{}], dtype=object)), "pair of numeric arrays"),
        ([1, 2], "pair of numeric arrays"),
        ("text", "pair of numeric arrays"),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=f"train.pkl' .*{message}"):
            read_pickled_arrays(path)
    assert target.exists()
    path.write_bytes(pickle.dumps((images(0, 2, 4, 4), labels(2)))[:-20])
    with pytest.raises(ValueError, match="train.pkl' is truncated"):
        read_pickled_arrays(path)
