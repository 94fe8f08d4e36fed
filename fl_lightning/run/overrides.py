"""Explains Hydra's composition errors in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fl_lightning.run.config import CONF  # importing it registers the schema

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def composed(name: str, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """Compose a configuration without running Hydra.

    Args:
        name: ``conf/<name>.yaml``.
        overrides: The words of a command line.
        with_hydra: Whether Hydra's own part, such as the run folder, is in it, too.
    """
    running = GlobalHydra.instance()
    before, running.hydra = running.hydra, None  # within a script Hydra is at work already
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(name, list(overrides), return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(explain(error, name, overrides)) from error
    finally:
        running.hydra = before


def explain(error: Exception, name: str, arguments: Sequence[str]) -> str:
    """Say in one sentence why a configuration could not be composed, with the close names where one is not known.

    Args:
        error: What Hydra or OmegaConf raised.
        name: The configuration, ``conf/<name>.yaml``.
        arguments: The words of the command line.
    """
    try:
        overrides = OverridesParser.create().parse_overrides([one for one in arguments if not one.startswith("-")])
    except OverrideParseException as wrong:
        return f"{wrong.override!r} is not of the form key=value; a value with commas, brackets or signs needs quotes"
    for override in overrides:
        group, value = override.key_or_group, override.value()
        if not group:
            return f"{override.input_line!r} is not of the form key=value"
        # A group whose choice goes to another key: "- personalization@baselines: ...".
        placed = re.search(rf"- (\w+)@{re.escape(group)}:", (CONF / f"{name}.yaml").read_text())
        if placed and isinstance(value, str | list):
            return f"{group} must be chosen in the group {placed[1]}; write '{placed[1]}@{override.input_line}'"
        # Hydra answers a group's null, 3 or true with a ValueError, [3] with a TypeError; ~group has no value.
        options = value if isinstance(value, list) else [value]
        nothing = any(isinstance(one, int | float | None) for one in options) and not override.is_delete()
        if (CONF / group).is_dir() and nothing:
            return _no_such_option(group, str(override.input_line).partition("=")[2])
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        chosen = [one.key_or_group for one in overrides if error.missing_cfg_file.startswith(f"{one.key_or_group}/")]
        group = max(chosen, key=len, default=error.missing_cfg_file.rpartition("/")[0])
        return _no_such_option(group, error.missing_cfg_file.removeprefix(f"{group}/"))
    if unknown := re.search(r"Could not override '([^'@]+)", str(error)):
        given = next((one.value() for one in overrides if one.key_or_group == unknown[1]), None)
        inner = re.search(r"Key '([^']+)' is not in struct", str(error.__cause__ or error))
        return _no_such_key(f"{unknown[1]}.{inner[1]}" if inner and isinstance(given, dict) else unknown[1])
    cause = error.__cause__ or error
    key = f"{cause.full_key}: " if isinstance(cause, OmegaConfBaseException) and cause.full_key else ""
    return key + " ".join(
        line.strip()
        for line in str(cause).splitlines()
        if not re.match(r" *(full_key|object_type|reference_type)", line)
    )


def _no_such_option(group: str, option: str) -> str:
    # Folders below a group hold more of its options, but for one that is a group itself.
    files = sorted(set((CONF / group).rglob("[!_]*.yaml")) - set((CONF / group / "partitioner").glob("*")))
    known = [str(one.relative_to(CONF / group).with_suffix("")) for one in files]
    close = [f"{group}={one}" for one in get_close_matches(option, known)]
    if group == "model" and option != "null":
        close.append(f"model=timm model.name={option}")
    tail = f"did you mean {' or '.join(close)}?" if close else f"these are: {', '.join(known)}"
    return f"there is no {group}={option}; {tail}"


def _no_such_key(key: str) -> str:
    known = sorted({one for file in CONF.rglob("*.yaml") if "comparison" not in file.parts for one in _keys_of(file)})
    root = key.partition(".")[0]
    if key in known:
        return f"there is no {key} with these choices; another option, of {root} perhaps, has it"
    known.sort(key=lambda one: one.partition(".")[0] != root)  # those below the same root first
    words = get_close_matches(key.rpartition(".")[2], {one.rpartition(".")[2] for one in known}, cutoff=0.75)
    close = get_close_matches(key, known, cutoff=0.85) or [one for one in known if one.rpartition(".")[2] in words][:3]
    tail = f"did you mean {' or '.join(close)}?" if close else f"+{key}=... adds one"
    return f"there is no {key}; {tail}"


def _keys_of(file: Path) -> Iterator[str]:
    text, group = file.read_text(), file.parent.relative_to(CONF)
    below = "" if group == Path() or text.startswith("# @package _global_") else ".".join(group.parts) + "."
    return _keys(yaml.load(text, LOADER), below)


def _keys(node: object, prefix: str) -> Iterator[str]:
    for key, value in node.items() if isinstance(node, Mapping) else ():
        if not str(key).startswith("_") and key not in ("defaults", "hydra"):
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")
