"""Published files at a hundredth of their size, and corruptions made of a small .npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fl_lightning.data.sets import corrupted_cifar
from fl_lightning.data.sets.corrupted_cifar import CorruptedCifar
from fl_lightning.data.sets.corruptions import CORRUPTIONS
from tests.data.made import small_cifar

PER_SEVERITY = 100
TYPES = ("fog", "snow")


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``CIFAR-10-C/<type>.npy``: row i of severity s shows image i; its value says all three."""
    monkeypatch.setattr(corrupted_cifar, "PUBLISHED_PER_SEVERITY", PER_SEVERITY)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(np.arange(PER_SEVERITY) % 10, 5).astype(np.uint8))
    for number, kind in enumerate(TYPES):
        x = np.zeros((5 * PER_SEVERITY, 32, 32, 3), dtype=np.uint8)
        x[:, 0, 0, 0] = np.tile(np.arange(PER_SEVERITY), 5)
        x[:, 0, 0, 1] = np.repeat(np.arange(1, 6), PER_SEVERITY)
        x[:, 0, 0, 2] = number
        np.save(folder / f"{kind}.npy", x)
    return tmp_path


@pytest.mark.parametrize("underlying", ["disjoint", "shared"])
def test_published_files(published: Path, underlying: str) -> None:
    data = CorruptedCifar(root=str(published), corruptions=TYPES, underlying=underlying, val_fraction=0.0)
    assert data.name == "cifar-10-c (published)"
    assert [client.name for client in data.clients] == [f"{kind} {s}" for kind in TYPES for s in range(1, 6)]
    shown: dict[str, list[set[int]]] = {"train": [], "test": []}
    for number, client in enumerate(data.clients):
        for split, seen in shown.items():
            x, y = client.examples(split)
            assert set(x[:, 1, 0, 0].tolist()) == {number % 5 + 1}
            assert set(x[:, 2, 0, 0].tolist()) == {number // 5}
            assert torch.equal(x[:, 0, 0, 0] % 10, y.byte())
            seen.append(set(x[:, 0, 0, 0].tolist()))
    trained, tested = set().union(*shown["train"]), set().union(*shown["test"])
    assert not trained & tested
    assert (len(trained), len(tested)) == (80, 20)
    sizes = (8, 2) if underlying == "disjoint" else (80, 20)
    assert {(client.num_train, client.num_test) for client in data.clients} == {sizes}


def test_fewer_images_a_client(published: Path) -> None:
    data = CorruptedCifar(
        root=str(published), corruptions=TYPES, underlying="shared", images_per_client=50, val_fraction=0.0
    )
    assert {(client.num_train, client.num_test) for client in data.clients} == {(40, 10)}


def test_the_folder_itself_may_be_given(published: Path) -> None:
    one = CorruptedCifar(root=str(published), corruptions=TYPES)
    other = CorruptedCifar(root=str(published / "CIFAR-10-C"), corruptions=TYPES)
    one.partition.check_equal(other.partition)


def test_bad_published_files(published: Path) -> None:
    folder = published / "CIFAR-10-C"
    with pytest.raises(FileNotFoundError, match="CIFAR-10-C' lacks frost.npy of CIFAR-10-C; put them there"):
        CorruptedCifar(root=str(published), corruptions=("fog", "frost"))
    with pytest.raises(FileNotFoundError, match="CIFAR-100-C' lacks labels.npy"):
        CorruptedCifar(name="cifar100", root=str(published), source="published")
    np.save(folder / "fog.npy", np.zeros((7, 32, 32, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="fog.npy' must hold 50,000 images"):
        CorruptedCifar(root=str(published), corruptions=TYPES)
    (folder / "fog.npy").write_bytes((folder / "snow.npy").read_bytes()[:5000])
    with pytest.raises(ValueError, match="fog.npy' is truncated"):
        CorruptedCifar(root=str(published), corruptions=TYPES)
    np.save(folder / "labels.npy", np.full(500, 12, dtype=np.uint8))
    with pytest.raises(ValueError, match="labels.npy' holds the label 12"):
        CorruptedCifar(root=str(published), corruptions=TYPES)


def test_made_corruptions_of_disjoint_images(tmp_path: Path) -> None:
    small_cifar(tmp_path)
    settings = {"root": str(tmp_path), "corruptions": ("contrast", "gaussian_noise"), "val_fraction": 0.0}
    data = CorruptedCifar(**settings)
    assert data.name == "cifar-10-c (made by fl_lightning)"
    assert data.partition.description["corruptions"] == "made by fl_lightning"
    assert {(client.num_train, client.num_test) for client in data.clients} == {(15, 5)}
    assert CorruptedCifar(**settings).partition.hash == data.partition.hash
    assert CorruptedCifar(**settings, seed=1).partition.hash != data.partition.hash
    contrasts = [client.examples("train")[0].float().std().item() for client in data.clients[:5]]
    assert contrasts == sorted(contrasts, reverse=True)


def test_swapped_classes_change_the_meaning_and_not_the_images(tmp_path: Path) -> None:
    small_cifar(tmp_path)
    settings = {"root": str(tmp_path), "corruptions": ("contrast",), "val_fraction": 0.0}
    plain, swapped = CorruptedCifar(**settings), CorruptedCifar(**settings, swapped_classes=4)
    meanings = []
    for one, other in zip(plain.clients, swapped.clients, strict=True):
        pairs: set[tuple[int, int]] = set()
        for split in ("train", "test"):
            assert torch.equal(one.examples(split)[0], other.examples(split)[0])
            pairs |= set(zip(one.examples(split)[1].tolist(), other.examples(split)[1].tolist(), strict=True))
        meaning = dict(pairs)
        assert len(meaning) == len(pairs)  # one new label for each old one, the same in training and test
        assert len(set(meaning.values())) == len(meaning)
        assert sum(new != old for old, new in pairs) <= 4
        meanings.append(meaning)
    assert any(new != old for meaning in meanings for old, new in meaning.items())
    assert any(meaning != meanings[0] for meaning in meanings)


def test_fifty_clients_by_default(tmp_path: Path) -> None:
    data = CorruptedCifar(root=str(small_cifar(tmp_path)))
    assert len(data.clients) == 50 == 5 * len(CORRUPTIONS)
    assert sum(client.num_train + client.num_val for client in data.clients) == 150
    assert sum(client.num_test for client in data.clients) == 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mnist"}, "name must be one of cifar10, cifar100, got 'mnist'"),
        ({"source": "web"}, "source must be one of auto, published, made, got 'web'"),
        ({"underlying": "mixed"}, "underlying must be one of disjoint, shared, got 'mixed'"),
        ({"test_fraction": 1.0}, r"test_fraction must lie in \(0, 1\), got 1.0"),
        ({"swapped_classes": 1}, "`swapped_classes` must be 0, or 2 to 10, got 1"),
        ({"severities": (0, 1)}, "severities are 1 to 5"),
        ({"corruptions": ()}, "must not be empty"),
        ({"corruptions": ("fog",)}, "corruptions must be one of .*got 'fog'"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    small_cifar(tmp_path)
    with pytest.raises(ValueError, match=message):
        CorruptedCifar(**{"root": str(tmp_path), **settings})  # type: ignore[arg-type]
