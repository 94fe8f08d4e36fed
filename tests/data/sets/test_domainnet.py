from __future__ import annotations

from pathlib import Path

import pytest

from fl_lightning.data.sets.domainnet import DomainNet
from tests.data.made import write_image

CLASSES = ["aircraft_carrier", "airplane", "zebra"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """``<domain>/<class>/<domain>_<class>_<number>.jpg`` and the lists: four training and two test images a class."""
    for domain in ("clipart", "sketch"):
        lines: dict[str, list[str]] = {"train": [], "test": []}
        for label, name in enumerate(CLASSES):
            for number in range(6):
                path = f"{domain}/{name}/{domain}_{label + 1:03d}_{number:06d}.jpg"
                write_image(tmp_path / path, value=80 * label, width=12, height=9)
                lines["train" if number < 4 else "test"].append(f"{path} {label}")
        for split, rows in lines.items():
            (tmp_path / f"{domain}_{split}.txt").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_official_lists(root: Path) -> None:
    data = DomainNet(root=str(root), domains=["sketch", "clipart"], resize=8, val_fraction=0.0)
    assert [(client.name, client.num_train, client.num_test) for client in data.clients] == [
        ("sketch", 12, 6),
        ("clipart", 12, 6),
    ]
    assert data.class_names == CLASSES
    assert data.image_size == 8
    x, y = data.clients[0].examples("test")
    assert ((x.float().mean((1, 2, 3)) - 80 * y).abs() < 2).all()


def test_a_subset_of_classes_is_numbered_anew(root: Path) -> None:
    data = DomainNet(root=str(root), domains=["clipart"], classes=["zebra", "airplane"], resize=8, val_fraction=0.0)
    assert data.class_names == ["zebra", "airplane"]
    x, y = data.clients[0].examples("train")
    assert sorted(y.tolist()) == [0] * 4 + [1] * 4
    assert ((x.float().mean((1, 2, 3)) - (160 - 80 * y)).abs() < 2).all()
    first = DomainNet(root=str(root), domains=["clipart"], classes=2, resize=8)
    assert first.class_names == CLASSES[:2]


def test_lists_may_lie_in_a_folder_of_their_own(root: Path) -> None:
    expected = DomainNet(root=str(root), domains=["clipart"], resize=8)
    (root / "splits").mkdir()
    for path in root.glob("*.txt"):
        path.rename(root / "splits" / path.name)
    expected.partition.check_equal(DomainNet(root=str(root), domains=["clipart"], resize=8).partition)


def test_missing_files_are_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no list '.*real_train.txt'; put .* images into '.*real'"):
        DomainNet(root=str(root), domains=["real"])
    next((root / "clipart" / "zebra").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match=r"no image file '.*clipart/zebra/clipart_003_\d+.jpg'"):
        DomainNet(root=str(root), domains=["clipart"])
    DomainNet(root=str(root), domains=["clipart"], classes=CLASSES[:2], resize=8)  # which is not needed here


def test_bad_lists_and_settings(root: Path) -> None:
    with pytest.raises(ValueError, match="`domains` names 'photo', but there are clipart, infograph"):
        DomainNet(root=str(root), domains=["photo"])
    with pytest.raises(ValueError, match="`classes` must be 2 to 3, or names, got 346"):
        DomainNet(root=str(root), domains=["clipart"], classes=346)
    with pytest.raises(ValueError, match="of which unknown: dragon"):
        DomainNet(root=str(root), domains=["clipart"], classes=["zebra", "dragon"])
    with pytest.raises(ValueError, match="at least two different names"):
        DomainNet(root=str(root), domains=["clipart"], classes=["zebra", "zebra"])
    (root / "clipart_train.txt").write_text("clipart/zebra/clipart_003_000000.jpg 2\nclipart/zeb")
    with pytest.raises(ValueError, match="Line 2 of '.*clipart_train.txt' must be"):
        DomainNet(root=str(root), domains=["clipart"])
