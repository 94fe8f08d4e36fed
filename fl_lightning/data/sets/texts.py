"""Texts as a federation: one client per file, cut into tokens by the model's own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import override

from fl_lightning.checks import ArgumentError, one_of, whole, within
from fl_lightning.data.federated_data import Examples, FederatedData
from fl_lightning.data.pools import SequencePool, TokenPool
from fl_lightning.data.splits import ClientIndices, hold_out
from fl_lightning.models.hf import is_missing

IGNORED = -100
"""Target of a position that does not count."""

Longer = Literal["refuse", "cut", "windows"]
Encode = Callable[[str], list[int]]


@dataclass(kw_only=True, eq=False, repr=False)
class Texts(FederatedData):
    """Reads ``root/<client>.txt``, ``.jsonl`` or ``.parquet`` as tokens.

    For a language model an example is ``length`` tokens, and its targets the tokens that follow each. A ``.txt`` is cut
    into windows that do not overlap. A line of a ``.jsonl``, or a row of a ``.parquet``, is one example, filled up at
    the right; what fills it up, and its prompt, do not count. With ``label`` the target is the class of the text: any
    values, in sorted order. The end of a file is kept for testing.

    Args:
        root: The folder.
        tokenizer: A folder or name of transformers, or a ``tokenizer.json``; None: bytes.
        length: Tokens of an example, at least 1.
        longer: What becomes of a line with more tokens. ``refuse``: an error. ``cut``: its end is left out.
            ``windows``: it becomes several examples.
        text: Field of a line that is learnt.
        prompt: Field that stands before it and is not learnt; None: there is none.
        label: Field with the class; None: the tokens themselves are learnt.
        test_fraction: Share of a file that is kept for testing, in (0, 1).
        unseen_clients: Names of clients that are held out of training.
    """

    root: str | None = None
    tokenizer: str | None = None
    length: int = 64
    longer: Longer = "refuse"
    text: str = "text"
    prompt: str | None = None
    label: str | None = None
    test_fraction: float = 0.2
    unseen_clients: Sequence[str] = ()

    @override
    def read(self) -> Examples:
        if self.augment:
            raise ArgumentError("augment must be null for texts")
        whole("length", self.length, 1)
        within("test_fraction", self.test_fraction, "(0, 1)")
        one_of("longer", self.longer, Longer)
        if self.root is None or not Path(self.root).is_dir():
            raise FileNotFoundError(
                f"data.root must name a folder with one .txt, .jsonl or .parquet per client, got {self.root!r}"
            )
        root = Path(self.root)
        files = sorted(path for path in root.iterdir() if path.suffix in (".txt", ".jsonl", ".parquet"))
        if not files:
            raise FileNotFoundError(f"data.root must hold a .txt, .jsonl or .parquet per client, and {root} holds none")
        encode, vocabulary, padding = open_tokenizer(self.tokenizer)
        found = {path.stem: self._examples(path, encode, padding) for path in files}
        if len(found) < len(files):
            raise ValueError(f"data.root must hold one file per client, and {root} holds two of one name")
        labels = sorted({label for rows in found.values() for _, _, label in rows if label is not None}, key=str)
        x, y, clients, start = [], [], [], 0
        for name, rows in found.items():
            tests = max(1, round(self.test_fraction * len(rows)))
            places = torch.arange(start, start + len(rows))
            clients.append(ClientIndices(name, places[:-tests], places[-tests:], None))
            start += len(rows)
            x += [tokens for tokens, _, _ in rows]
            y += [labels.index(label) if self.label else targets for _, targets, label in rows]
        tokens, targets = torch.tensor(x, dtype=torch.int32), torch.tensor(y, dtype=torch.int64)
        return Examples(
            name=root.resolve().name,
            source=TokenPool(tokens, targets) if self.label else SequencePool(tokens, targets),
            class_names=[str(one) for one in (labels if self.label else range(vocabulary))],
            clients=hold_out(clients, self.unseen_clients),
            description={"clients": "one per text"},
        )

    def _examples(self, path: Path, encode: Encode, padding: int) -> list[tuple[list[int], list[int], Any]]:
        """Return the examples of a file: tokens, targets and label of each."""
        if path.suffix == ".txt":
            if self.label or self.prompt:
                raise ArgumentError(
                    f"label and prompt must be null for plain texts such as {path.name}; use .jsonl or .parquet"
                )
            tokens = encode(path.read_text(encoding="utf-8", errors="replace"))
            rows = [self._example(part, 0, padding) for part in self._windows(tokens) if len(part) == self.length + 1]
        elif path.suffix == ".parquet":
            rows = []
            for number, entry in enumerate(read_parquet(path), 1):
                rows += self._entry(entry, f"{path}, row {number}", encode, padding)
        else:
            rows = []
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                rows += self._line(line, f"{path}, line {number}", encode, padding) if line.strip() else []
        if len(rows) < 3:
            raise ValueError(f"{path} must hold at least 3 examples of {self.length} tokens, and holds {len(rows)}")
        return rows

    def _windows(self, tokens: list[int]) -> list[list[int]]:
        return [tokens[start : start + self.length + 1] for start in range(0, max(1, len(tokens) - 1), self.length)]

    def _line(self, line: str, where: str, encode: Encode, padding: int) -> list[tuple[list[int], list[int], Any]]:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: must be JSON, got {error}") from error
        return self._entry(entry, where, encode, padding)

    def _entry(self, entry: Any, where: str, encode: Encode, padding: int) -> list[tuple[list[int], list[int], Any]]:
        """Return the examples of a line or a row."""
        fields = [field for field in (self.text, self.prompt, self.label) if field is not None]
        for field in fields:
            if not isinstance(entry, dict) or field not in entry:
                known = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
                raise ValueError(f"{where}: must have the field {field!r}, and has {known}; set data.{field}")
        prompt = encode(str(entry[self.prompt])) if self.prompt else []
        tokens = prompt + encode(str(entry[self.text]))
        # The classes of texts are read from all tokens; a language model's last token is a target only.
        most = self.length + (self.label is None)
        if len(tokens) > most and self.longer == "refuse":
            raise ValueError(
                f"{where}: an example must have at most {most} tokens with data.length={self.length}, got "
                f"{len(tokens)}; raise data.length, or set data.longer=cut or windows"
            )
        if self.label is not None:
            return [((tokens + [padding] * self.length)[: self.length], [], entry[self.label])]
        parts = self._windows(tokens) if self.longer == "windows" else [tokens[:most]]
        rows = [self._example(part, len(prompt) - number * self.length, padding) for number, part in enumerate(parts)]
        return [row for row in rows if any(target != IGNORED for target in row[1])]

    def _example(self, tokens: list[int], skipped: int, padding: int) -> tuple[list[int], list[int], None]:
        """Return tokens (length,) and the token after each; of the first ``skipped`` tokens none is a target."""
        targets = [IGNORED if place < skipped else token for place, token in enumerate(tokens)][1:]
        missing = self.length - len(targets)
        return tokens[: len(targets)] + [padding] * missing, targets + [IGNORED] * missing, None


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``.parquet``."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install 'fl_lightning[text]'") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged, or no parquet file: {str(error).splitlines()[0]}") from error
    return rows


def open_tokenizer(name: str | None) -> tuple[Encode, int, int]:
    """Return what turns text into tokens, the number of tokens, and the one that fills up short examples.

    Args:
        name: A folder or name of transformers, or a ``tokenizer.json``; None: bytes.
    """
    if name is None:
        return lambda text: list(text.encode()), 256, 0
    try:
        import transformers
    except ImportError as error:
        raise ImportError("data.tokenizer needs transformers: pip install 'fl_lightning[text]'") from error
    if is_missing(name):
        raise FileNotFoundError(
            f"data.tokenizer must be a folder, a tokenizer.json or a name on the hub, got {name}, which is not there"
        )
    library: Any = transformers
    try:
        if Path(name).is_file():
            made = library.PreTrainedTokenizerFast(tokenizer_file=name)
        else:
            made = library.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"data.tokenizer={name} cannot be loaded: {str(error).splitlines()[0]}") from error
    padding = made.pad_token_id if made.pad_token_id is not None else (made.eos_token_id or 0)
    made.model_max_length = int(1e9)  # whole texts are cut into windows here
    return lambda text: list(made(text, add_special_tokens=False)["input_ids"]), len(made), int(padding)
