"""Pages of the site that are made from the code: every key of ``conf/`` with its type, default and meaning."""

from __future__ import annotations

import builtins
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any, get_args

from hydra.utils import get_object
from omegaconf import OmegaConf

from fl_lightning.run.config import PersonalizeConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
SCRIPTS = {"train.yaml": "train.py", "personalize.yaml": "personalize.py"}
ADAPTERS = {"_target_": "fl_lightning.models.adapters.Adapters"}
COMMON = ("optimizer/sgd.yaml", "trainer/cpu.yaml")
SCHEMAS = {"train.yaml": TrainConfig, "personalize.yaml": PersonalizeConfig}
GROUPS = (
    "method",
    "data",
    "data/partitioner",
    "model",
    "optimizer",
    "trainer",
    "executor",
    "logger",
    "personalization",
    "task",
    "split_policy",
    "devices",
    "paths",
)
LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w.@/-]+):(?P<value>(?: [^#\n]*)?)(?:# ?(?P<comment>.*))?$")
ARGUMENT = re.compile(r"^ {4}(\w+)(?: \([^)]*\))?: (.*(?:\n {5,}.*)*)", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages (a hook of MkDocs)."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "reference/configuration.md", content=configuration()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to files outside the site be plain words (a hook of MkDocs)."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?!docs|tutorials|reference|explanation|\w+\.md)[^)]*\)", r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Write formulas as MathML, which browsers show without a script (a hook of MkDocs)."""
    from latex2mathml.converter import convert

    def formula(found: re.Match[str]) -> str:
        kind = "block" if found[1] == "div" else "inline"
        text = str(convert(unescape(found[2]), display=kind))
        return f"<div class=formula>{text}</div>" if kind == "block" else text

    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, html, flags=re.DOTALL)


def configuration() -> str:
    """Return the page of all keys, in Markdown."""
    parts = [
        "# Configuration\n\nMade from `conf/` and the constructors that it names. A key is set on the command line: "
        "`loop.rounds=30`.\n`+key=value` adds one that the file does not list; `python train.py --help` prints "
        "what is set.\n"
    ]
    for name, script in SCRIPTS.items():
        parts.append(f"## {script}\n\n{table(CONF / name, '')}")
    for group in GROUPS:
        parts.append(f"## {group}=\n")
        for file in sorted((CONF / group).glob("[!_]*.yaml")):
            is_global = file.read_text().startswith("# @package _global_")
            prefix = "" if is_global else f"{group.replace('/', '.')}."
            text = f"### {group}={file.stem}\n\n{introduction(file)}\n\n"
            parts.append(text + table(file, prefix))
    return "\n".join(parts)


def introduction(file: Path) -> str:
    """Return the comment at the head of a file."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    return escaped(" ".join(lines))


def table(file: Path, prefix: str) -> str:
    """Return the keys of a file as a table; empty if it sets none."""
    rows = []
    for key, default, kind, meaning in keys(file):
        if file.parent.name == "method":  # it sets what has its meaning elsewhere
            elsewhere = general().get(key, ("", ""))
            kind, meaning = elsewhere[0] or kind, meaning or elsewhere[1]
        rows.append(f"| `{prefix}{key}` | `{default or '{…}'}` | {f'`{kind}`' if kind else ''} | {escaped(meaning)} |")
    if not rows:
        return ""
    return "\n".join(["| key | default | type | meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"


@cache
def general() -> dict[str, tuple[str, str]]:
    """Return type and meaning of the keys that files of methods set, too."""
    found = {"method.name": ("str", "how results and tables name it")}
    nodes = {**OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml")), "model": {"adapters": ADAPTERS}}
    found |= dict(constructor_arguments(nodes, ""))
    for file, prefix in ((CONF / "train.yaml", ""), *((CONF / name, name.split("/")[0] + ".") for name in COMMON)):
        found |= {prefix + key: (kind, meaning) for key, _, kind, meaning in keys(file) if meaning}
    return found


def keys(file: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield dotted name, default, type and meaning of each key with a value."""
    content = OmegaConf.to_container(OmegaConf.load(file))
    described = dict(constructor_arguments(content, ""))
    schema = SCHEMAS[file.name].__annotations__ if file.parent == CONF and file.name in SCHEMAS else {}
    entries: list[list[str]] = []
    above: list[tuple[int, str]] = []
    skipped = -1
    for line in file.read_text().splitlines():
        found = LINE.match(line)
        if found is None:
            more = re.match(r"^ {4,}# (.*)$", line)
            if more and entries:  # a comment that goes on below its key
                entries[-1][2] += " " + more[1]
            continue
        indent, key = len(found["indent"]), found["key"]
        if 0 <= skipped < indent:
            continue
        skipped = indent if key in ("defaults", "hydra") else -1
        while above and above[-1][0] >= indent:
            above.pop()
        name = ".".join([*(word for _, word in above), key])
        above.append((indent, key))
        if key.startswith("_") or skipped >= 0:
            continue
        entries.append([name, (found["value"] or "").strip(), (found["comment"] or "").strip()])
    for name, default, comment in entries:
        kind, meaning = described.get(name, ("", ""))
        kind = kind or schema.get(name, "").removeprefix("Any") or type_of(content, name)
        kind = re.sub(r"Optional\[(.*)\]", r"\1 | None", kind)
        if default or comment:
            yield name, default, kind, comment or meaning


def constructor_arguments(node: Any, prefix: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield type and meaning of each key that is an argument of what ``_target_`` names."""
    if not isinstance(node, Mapping):
        return
    if target := node.get("_target_"):
        try:
            thing = get_object(str(target))
        except Exception:  # of an extra that is not installed
            thing = None
        if thing is not None:
            meanings = {name: " ".join(text.split()) for name, text in ARGUMENT.findall(inspect.getdoc(thing) or "")}
            for name, parameter in inspect.signature(thing).parameters.items():
                kind = "" if parameter.annotation is inspect.Parameter.empty else str(parameter.annotation)
                yield prefix + name, (spelt_out(kind, thing), meanings.get(name, ""))
    for key, value in node.items():
        yield from constructor_arguments(value, f"{prefix}{key}.")


def spelt_out(kind: str, thing: Any) -> str:
    """Return a type with the words that it admits in the place of a name for them."""
    known = vars(inspect.getmodule(thing) or builtins)
    return re.sub(r"\w+", lambda found: " | ".join(map(str, get_args(known.get(found[0])))) or found[0], kind)


def type_of(content: Any, name: str) -> str:
    """Return the type of a key's default; empty where that is null."""
    for word in name.split("."):
        content = content.get(word) if isinstance(content, Mapping) else None
    return "" if content is None or "${" in str(content) else type(content).__name__


def escaped(text: str) -> str:
    """Return text that stands in a cell of a table."""
    # A brace at the end of a cell would be read as attributes.
    text = text.replace("{", "&#123;").replace("}", "&#125;")
    return text.replace("|", r"\|").replace("<", "&lt;").replace("_", r"\_").replace(":class:", "").replace("``", "`")
