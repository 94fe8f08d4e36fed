"""What a run leaves behind in numbers: ``results.json`` at its end, ``metrics.csv`` round by round."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fl_lightning.files import append_text, write_text


def to_json(value: Any) -> str:
    """Strict JSON that every parser reads, indented, with a line end.

    NaN and infinities, which JSON does not know, become null; numpy and torch scalars and arrays become numbers and
    lists; paths become text.

    Raises:
        TypeError: If something else is in it, saying where.
    """
    return json.dumps(_plain(value, ""), indent=2, allow_nan=False) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON in one step; see :func:`to_json` and :func:`fl_lightning.files.write_text`."""
    write_text(path, to_json(value))


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}). It may be damaged or another kind of file.") from error
    return content


class MetricsTable:
    """``metrics.csv``: one row a round, kept on the disk as it grows.

    A row is on the disk when :meth:`append` returns. Columns may come and go: a new one is added at the right and is
    empty in older rows. Floats are written so that reading gives the same bits. A line that a killed process left
    unfinished is dropped.

    Args:
        path: The file.
        rows: What it holds; None: what is there is read. A run that goes on gives the rounds of its checkpoint.
        key: The column that counts up, first in the file.
    """

    def __init__(self, path: str | Path, rows: Sequence[Mapping[str, Any]] | None = None, key: str = "round") -> None:
        self.path = Path(path)
        self.key = key
        self.columns: list[str] = [key]
        self.rows: list[dict[str, Any]] = []
        if rows is None and self.path.exists():
            self._read()
        for row in rows or ():
            self._add(row)
        if self.rows:
            self._write()
        elif rows is not None:
            self.path.unlink(missing_ok=True)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row.

        Args:
            row: Values by column: numbers, text or None. It must hold the key column, with an integer larger than that
                of the last row.
        """
        plain, new = self._add(row)
        if new or not self.path.exists():
            self._write()
            return
        append_text(self.path, self._lines([plain]))

    def _add(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        number = row.get(self.key)
        if number is None or (self.rows and number <= self.rows[-1][self.key]):
            last = self.rows[-1][self.key] if self.rows else None
            raise ValueError(f"{self.key} must be above {last}, the last in {self.path}, got {number}")
        plain = {name: _plain_scalar(value, name) for name, value in row.items()}
        new = [name for name in plain if name not in self.columns]
        self.rows.append(plain)
        self.columns += new
        return plain, new

    def column(self, name: str) -> list[Any]:
        """The values of one column, None where a row has none."""
        if name not in self.columns:
            raise KeyError(f"'{self.path}' has no column '{name}'. It has: {', '.join(self.columns)}.")
        return [row.get(name) for row in self.rows]

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writerows(rows)
        return text.getvalue()

    def _write(self) -> None:
        header = io.StringIO()
        csv.writer(header, lineterminator="\n").writerow(self.columns)
        write_text(self.path, header.getvalue() + self._lines(self.rows))

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole))
        columns = list(reader.fieldnames or [])
        if not columns or columns[0] != self.key:
            raise ValueError(
                f"{self.path} must begin with the column {self.key!r}, got {text[:40]!r}; move another file away"
            )
        self.columns = columns
        self.rows = [{name: _parsed(cell) for name, cell in row.items()} for row in reader]
        if whole != text:
            self._write()


def _parsed(cell: str) -> Any:
    if cell == "":
        return None
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _plain_scalar(value: Any, name: str) -> Any:
    plain = value.item() if isinstance(value, (Tensor, np.generic, np.ndarray)) else value
    if plain is not None and not isinstance(plain, (int, float, str)):
        raise TypeError(f"{name} must be a number or text, got {type(value).__name__}")
    return plain


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _plain(value.tolist(), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"keys at {where or '/'} must be text, got {key!r}")
        return {key: _plain(item, f"{where}/{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}/{index}") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{where or '/'} must be a plain value, got {type(value).__name__}")
