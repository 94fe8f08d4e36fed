"""Which example belongs to which client, and to which of its splits: saved with a run, checked by what follows it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fl_lightning import files
from fl_lightning.data.splits import SPLITS, ClientIndices

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Partition:
    """How the examples of a source are divided among clients.

    A later stage must see the same clients as the one before it, or a personalised model is scored on examples that it,
    or the global model, was trained on. So a run saves its partition, and the next one compares it with its own.

    Args:
        source: Name of the data.
        fingerprint: SHA-256 of the data (see the source's ``fingerprint``), so that data that changed under the same
            indices is noticed.
        num_examples: Examples in the source.
        num_classes: Classes.
        clients: In the order of their ids, unseen ones last.
        description: How it was made (partitioner, its arguments, seed); for people, not compared.
    """

    source: str
    fingerprint: str
    num_examples: int
    num_classes: int
    clients: tuple[ClientIndices, ...]
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """SHA-256 over everything but the name and the description: two partitions are equal if these are."""
        content = {key: value for key, value in self._content().items() if key not in ("source", "description")}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "num_examples": self.num_examples,
            "num_classes": self.num_classes,
            "description": dict(self.description),
            "clients": [
                {"id": position, "name": client.name, "unseen": client.unseen}
                | {split: client.indices(split).tolist() for split in SPLITS}
                for position, client in enumerate(self.clients)
            ],
        }

    def to_json(self) -> str:
        """Text that :meth:`from_json` reads, with the hash; one line per client."""
        content = self._content()
        clients = ",\n".join(json.dumps(client, separators=(",", ":")) for client in content.pop("clients"))
        head = json.dumps(content | {"hash": self.hash}, indent=1)
        return f'{head[:-2]},\n "clients": [\n{clients}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str, where: str = "the partition") -> Partition:
        """Read what :meth:`to_json` wrote.

        Args:
            text: JSON.
            where: The file's name, for error messages.

        Raises:
            ValueError: If the text is damaged, foreign, or was changed after it was written.
        """
        try:
            content = json.loads(text)
            if content["format"] != _FORMAT:
                raise ValueError(f"{where} has format {content['format']}; this version reads format {_FORMAT}.")
            clients = tuple(
                ClientIndices(
                    name=str(client["name"]),
                    unseen=bool(client["unseen"]),
                    **{split: torch.tensor(client[split], dtype=torch.int64) for split in SPLITS},
                )
                for client in content["clients"]
            )
            partition = cls(
                source=str(content["source"]),
                fingerprint=str(content["fingerprint"]),
                num_examples=int(content["num_examples"]),
                num_classes=int(content["num_classes"]),
                clients=clients,
                description=content["description"],
            )
            expected = content["hash"]
        except (json.JSONDecodeError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{where} is damaged or not a partition ({type(error).__name__}: {error}).") from error
        if partition.hash != expected:
            raise ValueError(f"{where} was changed after it was written: its contents do not have the hash it states.")
        return partition

    def save(self, path: str | Path) -> None:
        """Write the partition as JSON, in one step."""
        files.write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Partition:
        """Read a partition file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no partition file '{path}'; give a run folder that has one.") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"'{path}' is damaged or not a partition ({error}).") from error
        return cls.from_json(text, where=f"'{path}'")

    def check_equal(self, other: Partition) -> None:
        """Raise unless another partition gives the same examples to the same clients.

        Args:
            other: Usually the one of an earlier run.

        Raises:
            ValueError: If they differ, naming what does.
        """
        differences = self.differences(other)
        if differences:
            raise ValueError(
                f"The data are not divided as before: {'; '.join(differences)}. Use the data settings and the seed of "
                "the earlier run."
            )

    def differences(self, other: Partition) -> list[str]:
        """What differs from another partition, in words; empty if nothing does."""
        differences = []
        if self.num_examples != other.num_examples:
            differences.append(f"{self.num_examples} examples here, {other.num_examples} there")
        elif self.fingerprint != other.fingerprint:
            differences.append(f"the images or labels of '{self.source}' are not those of '{other.source}' there")
        if self.num_classes != other.num_classes:
            differences.append(f"{self.num_classes} classes here, {other.num_classes} there")
        if len(self.clients) != len(other.clients):
            differences.append(f"{len(self.clients)} clients here, {len(other.clients)} there")
            return differences
        changed = [
            (position, part)
            for position, (ours, theirs) in enumerate(zip(self.clients, other.clients, strict=True))
            for part in _client_differences(ours, theirs)
        ]
        if changed:
            position, part = changed[0]
            num_clients = len({position for position, _ in changed})
            more = f" (and {num_clients - 1} more)" if num_clients > 1 else ""
            differences.append(f"client {position} '{self.clients[position].name}'{more}: another {part}")
        return differences


def _client_differences(ours: ClientIndices, theirs: ClientIndices) -> list[str]:
    parts = []
    if ours.name != theirs.name:
        parts.append(f"name ('{theirs.name}' there)")
    if ours.unseen != theirs.unseen:
        parts.append("role (unseen or not)")
    parts += [f"{split} split" for split in SPLITS if not torch.equal(ours.indices(split), theirs.indices(split))]
    return parts
