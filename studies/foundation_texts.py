"""Texts of four kinds that every Python installation holds, as a federation for ``data=texts``.

``python -m studies.foundation_texts DIR [CHARACTERS]`` writes ``DIR/<kind>.txt``: documentation strings and source code
of the standard library, licences and descriptions of installed packages; and ``DIR/base/base.txt``, what a model may
have read before: modules within the standard library's packages, of which no client has any.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

CHARACTERS = 120_000
"""Of each kind, at most, where no other number is given."""


def library() -> Iterator[Path]:
    """Yield the standard library's modules that lie at its top, in the order of their names."""
    yield from sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))


def docstrings() -> Iterator[str]:
    """Yield the documentation strings of the first half of the library."""
    for path in [*library()][::2]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield text


def source() -> Iterator[str]:
    """Yield the code of the other half, without comments and documentation strings."""
    for path in [*library()][1::2]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        yield ast.unparse(tree)


def licences() -> Iterator[str]:
    """Yield each licence of an installed package once."""
    seen: set[str] = set()
    for package in sorted(distributions(), key=lambda one: one.metadata["Name"] or ""):
        for file in package.files or ():
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
                path = Path(str(file.locate()))
                text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
                if text and text[:400] not in seen:
                    seen.add(text[:400])
                    yield text


def descriptions() -> Iterator[str]:
    """Yield the descriptions of installed packages."""
    for package in sorted(distributions(), key=lambda one: one.metadata["Name"] or ""):
        yield str(package.metadata.json.get("description") or "")


def packages() -> Iterator[str]:
    """Yield every fifth module within the standard library's packages, as it is."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test"}
    inner = [path for path in library.glob("*/[a-z]*.py") if path.parent.name not in left_out]
    for path in sorted(inner)[::5]:
        yield path.read_text(encoding="utf-8", errors="replace")


KINDS = {"docstrings": docstrings, "source": source, "licences": licences, "descriptions": descriptions}


def write(path: Path, texts: Iterator[str], characters: int) -> None:
    """Write the first characters of some texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = ""
    for text in texts:
        whole += text.strip() + "\n\n"
        if len(whole) >= characters:
            break
    kept = whole.encode("ascii", "ignore").decode()[:characters]
    path.write_text(kept, encoding="utf-8")
    print(f"{path.stem}: {len(kept)} characters")


def main(folder: Path, characters: int = CHARACTERS) -> None:
    """Write a file for each kind, of some characters at most, and one that is none of them."""
    for name, texts in KINDS.items():
        write(folder / f"{name}.txt", texts(), characters)
    write(folder / "base" / "base.txt", packages(), 4 * CHARACTERS)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m studies.foundation_texts DIR [CHARACTERS]")
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
