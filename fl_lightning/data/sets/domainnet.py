"""DomainNet: the same things as clip art, infographic, painting, quick drawing, photograph and sketch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from fl_lightning.data.federated_data import Examples, ImageFileData
from fl_lightning.data.image_files import Fit
from fl_lightning.data.splits import ClientIndices, hold_out

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


@dataclass(kw_only=True, eq=False, repr=False)
class DomainNet(ImageFileData):
    """Six domains of 345 classes as six clients, with the official training and test lists (feature shift).

    Peng et al., Moment Matching for Multi-Source Domain Adaptation, ICCV 2019, https://arxiv.org/abs/1812.01754.

    ``root`` holds the unpacked folders ``<domain>/<class>/`` and the lists ``<domain>_train.txt`` and
    ``<domain>_test.txt`` (or these in ``root/splits``), whose lines are ``<domain>/<class>/<file> <label>``.

    Args:
        root: The folder.
        domains: Which, in the order of the clients.
        classes: Names of the classes to keep, in the order of their labels; a number keeps the first so many of the
            official order; ``None`` keeps all 345.
    """

    root: str = "datasets/DomainNet"
    domains: Sequence[str] = DOMAINS
    classes: int | Sequence[str] | None = None
    fit: Fit = "squash"

    @override
    def read(self) -> Examples:
        root = Path(self.root)
        lists = {
            (domain, split): _read_list(_list_file(root, domain, split))
            for domain in self.domains
            for split in ("train", "test")
        }
        official = dict(sorted({label: path.split("/")[-2] for rows in lists.values() for path, label in rows}.items()))
        class_names = self._kept(list(official.values()))
        label_of = {old: class_names.index(name) for old, name in official.items() if name in class_names}
        paths: list[str] = []
        labels: list[int] = []
        indices = {}
        for key, rows in lists.items():
            kept = [(path, label_of[label]) for path, label in rows if label in label_of]
            indices[key] = torch.arange(len(paths), len(paths) + len(kept))
            paths += [path for path, _ in kept]
            labels += [label for _, label in kept]
        clients = [
            ClientIndices(name=domain, train=indices[domain, "train"], test=indices[domain, "test"])
            for domain in self.domains
        ]
        return Examples(
            name="domainnet",
            source=self.open_files(paths, torch.tensor(labels, dtype=torch.int64), root),
            class_names=class_names,
            clients=hold_out(clients, self.unseen_clients),
            description={"clients": "one per domain"},
        )

    def _kept(self, official: list[str]) -> list[str]:
        if self.classes is None:
            return official
        if isinstance(self.classes, int):
            if not 2 <= self.classes <= len(official):
                raise ValueError(f"`classes` must be 2 to {len(official)}, or names, got {self.classes}.")
            return official[: self.classes]
        unknown = [name for name in self.classes if name not in official]
        if unknown or len(set(self.classes)) < max(2, len(self.classes)):
            raise ValueError(
                f"`classes` must be at least two different names of DomainNet's {len(official)}, got "
                f"{list(self.classes)}{', of which unknown: ' + ', '.join(unknown) if unknown else ''}."
            )
        return list(self.classes)


def _list_file(root: Path, domain: str, split: str) -> Path:
    if domain not in DOMAINS:
        raise ValueError(f"`domains` names '{domain}', but there are {', '.join(DOMAINS)}.")
    name = f"{domain}_{split}.txt"
    found = next((path for path in (root / name, root / "splits" / name) if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"There is no list '{root / name}'; put the official lists there, and the images into '{root / domain}' "
            "(docs/data.md says where to get them)."
        )
    return found


def _read_list(path: Path) -> list[tuple[str, int]]:
    """The image files and labels of a list."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if name.count("/") < 2 or not label.isdecimal():
            raise ValueError(f"Line {number} of '{path}' must be '<domain>/<class>/<file> <label>', got '{line}'.")
        rows.append((name, int(label)))
    return rows
