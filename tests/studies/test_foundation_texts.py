"""The texts of the study of language models: four files, of unlike kinds."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from studies import foundation_texts


def test_four_kinds_of_text(tmp_path: Path) -> None:
    with mock.patch.object(foundation_texts, "CHARACTERS", 3000):
        foundation_texts.main(tmp_path, 3000)
    written = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert written.keys() == {"docstrings", "source", "licences", "descriptions"}
    assert all(1000 < len(text) <= 3000 for text in written.values())
    assert 4000 < len((tmp_path / "base" / "base.txt").read_text()) <= 12000
    assert '"""' not in written["source"]
