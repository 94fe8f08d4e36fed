"""Bring your own federation: a folder with one client per file or per sub-folder."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from typing_extensions import override

from fl_lightning.data.client_data import Source
from fl_lightning.data.federated_data import Examples, ImageFileData
from fl_lightning.data.image_files import IMAGE_ENDINGS
from fl_lightning.data.pools import ImagePool, TrainTest, pool_clients
from fl_lightning.data.readers import check_shape, class_names_of, read_train_test_npz
from fl_lightning.data.splits import ClientIndices, Split, hold_out, with_test

#: How the folders of a split may be called, in any case.
LEVELS: dict[str, Split] = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False, repr=False)
class Folder(ImageFileData):
    """Reads ``root/<client>.npz``, or images in ``root/<client>/<class>/`` or ``root/<client>/{train,test}/<class>/``.

    At a site of one client, ``root`` may also be its ``.npz``, or its folder ``root/<class>/`` or
    ``root/{train,test}/<class>/``.

    A ``.npz`` holds ``x_train, y_train, x_test, y_test`` (images uint8, (N, H, W) or (N, H, W, C)), and may hold
    ``x_val, y_val``. Where image folders have no ``train`` and ``test`` level, a part of each client's images, class by
    class, is kept for testing; beside these levels there may be a ``val``. Clients are numbered in the order of their
    names.

    Args:
        root: The folder.
        classes: Number of classes or their names; ``None`` counts the labels, or takes the names of the class folders.
        channels: 1 or 3; ``None`` keeps what a ``.npz`` has, and reads image files in colour.
        resize: Height and width in pixels; ``None`` keeps what a ``.npz`` has, and is an error for image files.
        test_fraction: Share of each client's images kept for testing, where the folders do not say which.
    """

    root: str | None = None
    classes: int | Sequence[str] | None = None
    channels: int | None = None
    resize: int | None = None
    test_fraction: float = 0.2

    @override
    def read(self) -> Examples:
        if self.root is None:
            raise ValueError("data.root must name the folder with one .npz or one sub-folder per client")
        root = Path(self.root)
        if self.client is not None and root.suffix.lower() == ".npz" and root.is_file():
            return self._examples(root, *self._read_archives([root]), "one per file")
        if not root.is_dir():
            raise FileNotFoundError(f"data.root must name a folder, and there is no folder '{root}'")
        visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        archives = [path for path in visible if path.suffix.lower() == ".npz"]
        folders = [path for path in visible if path.is_dir()]
        if archives and folders:
            raise ValueError(
                f"'{root}' has both .npz files ({archives[0].name}, …) and sub-folders ({folders[0].name}, …), so it "
                "is not clear what a client is; keep one kind"
            )
        if not archives and not folders:
            raise FileNotFoundError(
                f"'{root}' has no client: put one .npz per client there, or one folder of class folders per client"
            )
        if self.client is not None and folders and _is_client(root, folders):
            return self._examples(root, *self._read_folders(root, [root]), "one per folder")
        _check_names(root, [path.stem for path in archives] or [path.name for path in folders])
        read = self._read_archives(archives) if archives else self._read_folders(root, folders)
        return self._examples(root, *read, "one per file" if archives else "one per folder")

    def _examples(
        self, root: Path, source: Source, class_names: Sequence[str], clients: list[ClientIndices], form: str
    ) -> Examples:
        return Examples(
            name=root.resolve().name,
            source=source,
            class_names=class_names,
            clients=hold_out(clients, self.unseen_clients),
            description={"clients": form},
        )

    def _read_archives(self, paths: list[Path]) -> tuple[Source, list[str], list[ClientIndices]]:
        num_classes = self.classes if isinstance(self.classes, int) or self.classes is None else len(self.classes)
        clients: dict[str, TrainTest] = {}
        for path in paths:
            data = clients[path.stem] = read_train_test_npz(path, num_classes, self.channels, self.resize)
            first = next(iter(clients.values()))
            check_shape(data.x_train, f"x_train of '{path}'", first.x_train, f"'{paths[0]}'")
        class_names = class_names_of(self.classes, [data.y_train for data in clients.values()])
        for path, data in zip(paths, clients.values(), strict=True):
            for name, labels in (("y_test", data.y_test), ("y_val", data.y_val)):
                if labels is not None and len(labels) and (most := int(labels.max())) >= len(class_names):
                    raise ValueError(
                        f"{name} of '{path}' holds the label {most}, and no client trains on it: the "
                        f"{len(class_names)} classes counted are 0 to {len(class_names) - 1}; set data.classes if it "
                        "is right"
                    )
        if Path(self.root or "").is_dir():
            _log_ignored(paths[0].parent, {str(path) for path in paths})
        x, y, indices = pool_clients(clients)
        return ImagePool(x, y), class_names, indices

    def _read_folders(self, root: Path, folders: list[Path]) -> tuple[Source, list[str], list[ClientIndices]]:
        files_of = {
            (client, split): class_files(level) for client in folders for split, level in _split_levels(client).items()
        }
        class_names = self._class_names(root, sorted({name for files in files_of.values() for name in files}))
        paths: list[str] = []
        labels: list[int] = []
        places: dict[Path, dict[str, torch.Tensor]] = {client: {} for client in folders}
        for (client, split), files in files_of.items():
            start = len(paths)
            for name, found in files.items():
                if name not in class_names:
                    raise ValueError(
                        f"'{client}' has a folder '{name}', which is not among the classes {', '.join(class_names)}"
                    )
                paths += [file.relative_to(root).as_posix() for file in found]
                labels += [class_names.index(name)] * len(found)
            places[client][split] = torch.arange(start, len(paths))
        _log_ignored(root, {str(root / path) for path in paths})
        y = np.array(labels, dtype=np.int64)
        # A client at a site of its own has one name, whatever its folder is called: what is drawn follows from it.
        alone = self.client if len(folders) == 1 else None
        names = {client: alone or client.name for client in folders}
        clients = [
            with_test(names[client], parts["all"], y[parts["all"].numpy()], self.test_fraction, self.seed)
            if "all" in parts
            else ClientIndices(client.name, parts["train"], parts["test"], parts.get("val"))
            for client, parts in places.items()
        ]
        return self.open_files(paths, torch.from_numpy(y), root), class_names, clients

    def _class_names(self, root: Path, found: list[str]) -> list[str]:
        alike = [name for name, count in Counter(map(str.casefold, found)).items() if count > 1]
        if alike:
            names = ", ".join(name for name in found if name.casefold() in alike)
            log.warning("'%s' has classes whose names differ in case alone: %s; they are kept apart", root, names)
        if isinstance(self.classes, int) and len(found) != self.classes:
            raise ValueError(f"data.classes is {self.classes}, but '{root}' has {len(found)}: {', '.join(found)}")
        if self.classes is None or isinstance(self.classes, int):
            return found
        return class_names_of(self.classes, [])


def _is_client(root: Path, folders: Sequence[Path]) -> bool:
    """Tell whether a folder is that of one client: it holds its splits, or its classes."""
    return {path.name.lower() for path in folders} <= {*LEVELS} or any(
        file.suffix.lower() in IMAGE_ENDINGS for folder in folders for file in folder.iterdir()
    )


def _check_names(root: Path, names: Sequence[str]) -> None:
    """Raise unless the names can be those of clients."""
    if {name.lower() for name in names} <= {*LEVELS}:
        raise ValueError(
            f"'{root}' has {', '.join(names)} alone, which are splits and no clients; put the data of each client into "
            f"'{root}/<client>/', or divide one .npz with data=npz"
        )
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise ValueError(f"'{root}' has more than one file for the client '{twice}'; rename one")
    for name in names:
        if name.encode(errors="replace").decode() != name:
            raise ValueError(f"the name of the client {ascii(name)} is not UTF-8; rename it")


def _split_levels(client: Path) -> dict[str, Path]:
    """The folders of class folders of one client: its train, test and val levels, or itself as "all"."""
    found = [path for path in sorted(client.iterdir()) if path.is_dir() and path.name.lower() in LEVELS]
    levels: dict[str, Path] = {LEVELS[path.name.lower()]: path for path in found}
    if not {"train", "test"} & {*levels}:
        return {"all": client}
    for split in ("train", "test"):
        if split not in levels:
            raise ValueError(f"'{client}' has a {found[0].name} folder and no {split} folder; it needs both")
    if len(levels) < len(found):
        raise ValueError(f"'{client}' has {', '.join(path.name for path in found)}; keep one folder for each split")
    return {split: levels[split] for split in ("train", "test", "val") if split in levels}


def class_files(folder: Path) -> dict[str, list[Path]]:
    """Image files of each class folder, sorted by name."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"'{folder}' has no class folders; images go to '{folder}/<class>/'")
    files = {
        path.name: sorted(
            file
            for file in path.iterdir()
            if file.suffix.lower() in IMAGE_ENDINGS and file.is_file() and not file.name.startswith(".")
        )
        for path in classes
    }
    for name, found in files.items():
        if not found:
            raise ValueError(
                f"'{folder / name}' has no image ({', '.join(IMAGE_ENDINGS)}); remove the folder or fill it"
            )
    return files


def _log_ignored(root: Path, read: Collection[str]) -> None:
    """Log how many files of a folder were left out, but hidden ones."""
    ignored = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        ignored += [path for name in names if name[0] != "." and (path := os.path.join(folder, name)) not in read]
    if ignored:
        some = ", ".join(os.path.relpath(path, root) for path in sorted(ignored)[:5])
        more = ", …" if len(ignored) > 5 else ""
        text = some.encode(errors="replace").decode() + more
        log.warning("%d file(s) of '%s' are ignored: %s", len(ignored), root, text)
