from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fl_lightning.data.sets.celeba import CelebA
from tests.data.made import sizes, write_image

NUM = 120


def groups() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blond, male and part of each image: every combination equally often, a third of all for testing."""
    numbers = np.arange(NUM)
    return numbers % 2, numbers // 2 % 2, np.array([0, 2, 1])[numbers // 4 % 3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The published files. An image's grey value says its number."""
    folder = tmp_path / "celeba"
    blond, male, part = groups()
    lines = [str(NUM), "5_o_Clock_Shadow Blond_Hair Male Young "]
    for number in range(NUM):
        write_image(folder / "img_align_celeba" / f"{number + 1:06d}.png", number, width=6, height=8)
        (folder / "img_align_celeba" / f"{number + 1:06d}.png").rename(
            folder / "img_align_celeba" / f"{number + 1:06d}.jpg"
        )
        signs = " ".join(f"{2 * value - 1:2d}" for value in (0, blond[number], male[number], 1))
        lines.append(f"{number + 1:06d}.jpg {signs}")
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{number + 1:06d}.jpg {part[number]}" for number in range(NUM)]
    (folder / "list_eval_partition.txt").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_clients_differ_in_what_gender_says_about_hair(root: Path) -> None:
    data = CelebA(root=str(root), agreements=(0.9, 0.1), resize=4, val_fraction=0.0)
    blond, male, part = groups()
    assert data.class_names == ["not Blond_Hair", "Blond_Hair"]
    seen: list[int] = []
    for client, agreement in zip(data.clients, (0.9, 0.1), strict=True):
        for split in ("train", "test"):
            x, y = client.examples(split)
            numbers = x[:, 0, 0, 0].numpy()
            assert (blond[numbers] == y.numpy()).all()
            assert ((part[numbers] == 2) == (split == "test")).all()
            assert (blond[numbers] == male[numbers]).mean() == pytest.approx(agreement, abs=0.03)
            seen += numbers.tolist()
    assert len(set(seen)) == len(seen)
    assert [client.name for client in data.clients] == ["agreement 0.9", "agreement 0.1"]


def test_other_attributes_and_sizes(root: Path) -> None:
    data = CelebA(
        root=str(root),
        label="Male",
        attribute="Blond_Hair",
        agreements=(0.5, 0.75),
        train_per_client=16,
        test_per_client=8,
        unseen_clients=["agreement 0.75"],
        resize=4,
        val_fraction=0.25,
    )
    assert sizes(data) == [(12, 4, 8)] * 2
    assert [client.name for client in data.unseen] == ["agreement 0.75"]


@pytest.mark.parametrize("name", ["list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"])
def test_missing_files_are_named(root: Path, name: str) -> None:
    (root / "celeba" / name).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"There is no '.*celeba/{name}'; put CelebA's"):
        CelebA(root=str(root))


def test_truncated_tables_are_named(root: Path) -> None:
    path = root / "celeba" / "list_attr_celeba.txt"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="list_attr_celeba.txt' is truncated: it announces 120 images"):
        CelebA(root=str(root))
    path.write_text(text)
    path = root / "celeba" / "list_eval_partition.txt"
    path.write_text(path.read_text()[:500])
    with pytest.raises(ValueError, match="list_eval_partition.txt' is truncated: it does not say"):
        CelebA(root=str(root))


def test_bad_settings(root: Path) -> None:
    with pytest.raises(ValueError, match="has no attribute 'Bald'; it has 5_o_Clock_Shadow, Blond_Hair, Male, Young"):
        CelebA(root=str(root), label="Bald")
    with pytest.raises(ValueError, match="`label` and `attribute` must differ, got 'Male' for both"):
        CelebA(root=str(root), label="Male")
    with pytest.raises(ValueError, match="ask for fewer images or other agreements"):
        CelebA(root=str(root), train_per_client=1000)
