"""Text as a federation: one client per file of tokens or of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from fl_lightning.checks import at_least, within
from fl_lightning.data.federated_data import Examples, FederatedData
from fl_lightning.data.pools import TokenPool, TrainTest, pool_clients
from fl_lightning.data.readers import MAX_CLASSES, read_npz
from fl_lightning.data.splits import hold_out

BYTES = 256


@dataclass(kw_only=True, eq=False, repr=False)
class Tokens(FederatedData):
    """Reads ``root/<client>.npz`` with token sequences, or ``root/<client>.txt``, whose bytes are the tokens.

    A ``.npz`` holds ``x_train, x_test`` (integers, (N, T), padded at the left with 0) and ``y_train, y_test`` (N,): the
    token after each sequence, for example the letter of an answer. A text is cut into windows of ``length`` bytes that
    do not overlap; the byte after each is its label, and the end of the text is kept for testing.

    Args:
        root: The folder.
        vocabulary: Number of tokens; ``None`` counts them, or takes the 256 bytes of a text.
        length: Bytes of a window, at least 1; of texts alone.
        test_fraction: Share of a text that is kept for testing, in (0, 1).
        unseen_clients: Names of clients that are held out of training.
    """

    root: str | None = None
    vocabulary: int | None = None
    length: int = 64
    test_fraction: float = 0.2
    unseen_clients: Sequence[str] = ()

    @override
    def read(self) -> Examples:
        if self.augment:
            raise ValueError("`augment` is for images, and these are tokens; set it to null.")
        at_least("length", self.length, 1)
        within("test_fraction", self.test_fraction, "(0, 1)")
        if self.root is None or not Path(self.root).is_dir():
            raise FileNotFoundError(
                f"`data.root` must name a folder with one .npz or .txt per client, got {self.root!r}."
            )
        root = Path(self.root)
        archives, texts = (sorted(p for p in root.iterdir() if p.suffix.lower() == end) for end in (".npz", ".txt"))
        if bool(archives) == bool(texts):
            raise ValueError(f"'{root}' must hold .npz files or .txt files, one per client, and not both.")
        data = {path.stem: self._archive(path) if archives else self._text(path) for path in archives or texts}
        lengths = {name: one.x_train.shape[1] for name, one in data.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"sequences must have one length, got {lengths}; pad the shorter ones at the left with 0.")
        x, y, clients = pool_clients(data)
        most = max(int(part.max()) for part in (x, y) if part.numel())
        vocabulary = self.vocabulary or (most + 1 if archives else BYTES)
        within("vocabulary", vocabulary, f"[2, {MAX_CLASSES}]")
        if most >= vocabulary:
            raise ValueError(f"'{root}' holds the token {most}, and vocabulary is {vocabulary}")
        return Examples(
            name=root.resolve().name,
            source=TokenPool(x, y),
            class_names=[str(token) for token in range(vocabulary)],
            clients=hold_out(clients, self.unseen_clients),
            description={"clients": "one per file of tokens" if archives else "one per text"},
        )

    def _archive(self, path: Path) -> TrainTest:
        arrays = read_npz(path)
        for x, y in zip(list(arrays)[::2], list(arrays)[1::2], strict=True):
            if arrays[x].ndim != 2 or arrays[y].shape != arrays[x].shape[:1]:
                raise ValueError(
                    f"{x} of '{path}' must be (N, T) and {y} (N,), got {arrays[x].shape} and {arrays[y].shape}"
                )
        dtypes = {"x": torch.int32, "y": torch.int64}
        return TrainTest(**{n: _integers(a, f"{n} of '{path}'", dtypes[n[0]]) for n, a in arrays.items()})

    def _text(self, path: Path) -> TrainTest:
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        windows = len(content) // (self.length + 1)
        tests = max(1, round(self.test_fraction * windows))
        if windows - tests < 1:
            raise ValueError(
                f"'{path}' has {len(content)} bytes, too few for two windows of {self.length} and a label."
            )
        rows = torch.from_numpy(content[: windows * (self.length + 1)].astype(np.int32)).view(windows, -1)
        x, y = rows[:, :-1], rows[:, -1].to(torch.int64)
        return TrainTest(x[:-tests], y[:-tests], x[-tests:], y[-tests:])


def _integers(array: NDArray[Any], what: str, dtype: torch.dtype) -> Tensor:
    if not np.issubdtype(array.dtype, np.integer) or (array.size and array.min() < 0):
        raise ValueError(f"{what} must hold whole numbers of at least 0, got {array.dtype}.")
    return torch.from_numpy(array.astype(np.int64)).to(dtype)
