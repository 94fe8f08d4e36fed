"""From YAML to objects, with every mistake named before anything is made.

Hydra itself lets two through: a misspelt name under ``callbacks`` arrives as a plain dict, and values below the root
have no types. A constructor's signature is the schema here: :func:`check` compares each node with what it would call.
"""

from __future__ import annotations

import collections.abc
import importlib.util
import inspect
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import get_object
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from fl_lightning.checks import ArgumentError, finite

_PACKAGE = Path(__file__).resolve().parents[1]
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"  # installed; in a checkout


@dataclass
class PathsConfig:
    """Where runs go."""

    log_dir: str = MISSING


@dataclass
class TrainConfig:
    """The root of ``conf/train.yaml``. A key that is not here is refused; constructors are the schema below."""

    seed: int = MISSING
    resume: Optional[str] = None  # noqa: UP045 - omegaconf reads this annotation at run time, on Python 3.10 too
    init_from: Optional[str] = None  # noqa: UP045
    method: dict[str, Any] = field(default_factory=dict)
    data: Any = MISSING
    task: Any = None
    model: Any = MISSING
    module: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = None
    trainer: Any = MISSING
    sharing: Any = MISSING
    local: Any = MISSING
    cohort: Any = MISSING
    aggregator: Any = MISSING
    executor: Any = MISSING
    loop: Any = MISSING
    evaluation: Any = MISSING
    checkpoint: Any = None
    dashboard: Any = None
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: Any = None
    progress: Any = None
    paths: PathsConfig = field(default_factory=PathsConfig)
    trust: list[str] = field(default_factory=list)


@dataclass
class SelectConfig:
    """What is chosen on validation data."""

    per: Optional[str] = MISSING  # noqa: UP045
    by: str = MISSING
    margin: float = MISSING


@dataclass
class NewcomersConfig:
    """With how many examples clients are tried that never took part, and how often."""

    examples: Optional[list[Optional[int]]] = MISSING  # noqa: UP045
    draws: int = MISSING


@dataclass
class ScoresConfig:
    """What is scored; None: as in the run that is personalized."""

    metric: Optional[str] = None  # noqa: UP045
    mode: Optional[str] = None  # noqa: UP045
    metrics: Any = None


@dataclass
class CurvesConfig:
    """How often curves have a point."""

    every: Optional[int] = MISSING  # noqa: UP045


@dataclass
class FloodingConfig:
    """Above what level the training loss is kept, and from which epoch on."""

    level: Optional[float] = None  # noqa: UP045
    from_epoch: int = 0


@dataclass
class PersonalizeConfig:
    """The root of ``conf/personalize.yaml``; read as :class:`TrainConfig` is."""

    resume: Optional[str] = None  # noqa: UP045
    checkpoint: str = MISSING
    beside: list[str] = field(default_factory=list)
    seed: int = MISSING
    seeds: int = MISSING
    epochs: int = MISSING
    lr: float = MISSING
    batch_size: Optional[int] = None  # noqa: UP045
    head: list[str] = MISSING
    new_head: bool = False
    lp_epochs: int = MISSING
    lp_lr: Optional[float] = None  # noqa: UP045
    ft_lr: Optional[float] = None  # noqa: UP045
    batch_norm: str = MISSING
    grid: Any = None
    save_models: bool = MISSING
    figures: bool = MISSING
    intervals: Optional[str] = None  # noqa: UP045
    select: SelectConfig = field(default_factory=SelectConfig)
    best_of: Optional[list[str]] = None  # noqa: UP045
    matrix: Any = True
    newcomers: NewcomersConfig = field(default_factory=NewcomersConfig)
    evaluation: ScoresConfig = field(default_factory=ScoresConfig)
    curves: CurvesConfig = field(default_factory=CurvesConfig)
    data: Any = None
    task: Any = None
    model: Any = None
    module: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = None
    trainer: Any = MISSING
    flooding: FloodingConfig = field(default_factory=FloodingConfig)
    local: Any = MISSING
    executor: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, Any] = field(default_factory=dict)
    personalization: dict[str, Any] = field(default_factory=dict)
    logger: Any = None
    paths: PathsConfig = field(default_factory=PathsConfig)
    trust: list[str] = field(default_factory=list)


APART = {"model": {"adapters"}, "evaluation": {"metrics"}}
"""Keys of a node that are no arguments of what it names, but make objects of their own."""

OmegaConf.register_new_resolver("sum", lambda *terms: sum(terms), replace=True)
ConfigStore.instance().store(name="train_schema", node=TrainConfig)
ConfigStore.instance().store(name="personalize_schema", node=PersonalizeConfig)


def instantiate(node: Any, path: str, /, *args: Any, **kwargs: Any) -> Any:
    """Make the object that a node describes.

    Args:
        node: A node with ``_target_``, or None.
        path: Where it stands in the configuration, for messages.
        args: Passed on.
        kwargs: Passed on.

    Returns:
        The object, or None for None.

    Raises:
        ValueError: If the node is not sound (see :func:`check`), or whatever the constructor raises.
    """
    if node is None:
        return None
    check_node(node, path)
    check(node, path, kwargs)
    node = {key: value for key, value in node.items() if key not in APART.get(path, ())}
    try:
        return hydra_instantiate(node, *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        # Hydra wraps the constructor's own sentence in a paragraph about itself, and says there which node it was.
        if isinstance(error.__cause__, ArgumentError):
            below = re.search(r"^full_key: (.+)$", str(error), re.M)
            raise ArgumentError(f"{path}.{below.group(1) + '.' if below else ''}{error.__cause__}") from None
        if isinstance(error.__cause__, (ValueError, TypeError, OSError, ImportError)):
            raise error.__cause__ from None
        raise ValueError(f"{path}: {error.__cause__ or str(error).splitlines()[0]}") from error


def check_node(node: Any, path: str) -> None:
    """Refuse what names no class."""
    if not isinstance(node, (Mapping, DictConfig)):
        raise ValueError(
            f"{path}: expected a node with _target_, got {node!r}; for one value of it, write {path}.<key>=..."
        )
    if "_target_" not in node:
        raise ValueError(f"{path} must name a class by _target_, got the keys {', '.join(map(str, node)) or 'none'}")


def instantiate_dict(node: Mapping[str, Any] | None, path: str) -> dict[str, Any]:
    """Make a dict of named objects; an entry that is null is switched off."""
    entries = {name: value for name, value in (node or {}).items() if value is not None}
    complete = [name for name, value in entries.items() if isinstance(value, Mapping) and "_target_" in value]
    for name in entries:
        if name not in complete:
            close = get_close_matches(str(name), complete) or complete
            raise ValueError(
                f"{path}.{name} has no _target_, so it is nothing that could run; "
                + (f"did you mean {' or '.join(f'{path}.{other}' for other in close)}?" if close else "name a class")
            )
    return {str(name): instantiate(entries[name], f"{path}.{name}") for name in entries}


def check(node: Any, path: str = "", given: Collection[str] | None = None) -> None:
    """Compare a node, and all nodes in it, with the signatures of what they would call.

    Args:
        node: Plain, or a ``DictConfig``.
        path: Where it stands in the configuration; empty for the whole of it.
        given: The arguments that the program adds to those of the node; None: not known yet.

    Raises:
        ValueError: If a key is no argument, an argument is missing, a value is of another type than the argument's, or
            a number is NaN or infinite.
    """
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, float):
        finite(path, node)
    elif isinstance(node, Mapping):
        if "_target_" in node:
            _check_call(node, path, given)
        for key, value in node.items():
            check(value, f"{path}.{key}" if path else str(key), None if given is None else ())
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            check(value, f"{path}[{index}]", None if given is None else ())


def _check_call(node: Mapping[str, Any], path: str, given: Collection[str] | None) -> None:
    name = node["_target_"]
    if not isinstance(name, str):
        raise ValueError(f"{path}._target_ must name a class or function, got {'null' if name is None else name}")
    try:
        target = get_object(name)
    except Exception as error:
        own = name.partition(".")[0]
        here = (
            bool(own) and importlib.util.find_spec(own) is None and (Path(own).is_dir() or Path(f"{own}.py").is_file())
        )
        hint = "; PYTHONPATH=. lets Python find it" if here else ""
        raise ValueError(f"{path}._target_: cannot import {name!r}: {' '.join(str(error).split())}{hint}") from error
    try:
        parameters = inspect.signature(target).parameters
    except (ValueError, TypeError):
        raise ValueError(f"{path}._target_ must name a class or function with known arguments, got {name!r}") from None
    by_name = [key for key, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    takes_anything = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    apart = APART.get(path, ())
    keys = [str(key) for key in node if not (key in apart or (str(key).startswith("_") and str(key).endswith("_")))]
    for key in [] if takes_anything else keys:
        if key not in by_name:
            close = get_close_matches(key, by_name)
            words = f"did you mean {' or '.join(close)}?" if close else f"it takes {', '.join(by_name) or 'none'}"
            if path == "module" and not close:
                words += "; where the method sets it, it needs the module of the method: choose another method"
            raise ValueError(f"{path}.{key}: {name} takes no such argument; {words}")
    if given is not None and not takes_anything and (unknown := [key for key in given if key not in by_name]):
        raise ValueError(f"{path}._target_ must take {', '.join(unknown)}, got {name!r}")
    if given is not None and not (node.get("_partial_") or "_args_" in node):
        for key in by_name:
            if parameters[key].default is inspect.Parameter.empty and key not in {*keys, *given}:
                raise ValueError(f"{path}.{key} must be given, or {path}._partial_=true where {name} is called later")
    if not isinstance(node.get("_partial_", False), bool):
        raise ValueError(f"{path}._partial_ must be true or false, got {node['_partial_']!r}")
    hints = _hints(target)
    for key in keys:
        if key in hints and not fits(node[key], hints[key]):
            raise ValueError(f"{path}.{key} must be {expected(hints[key])}, got {node[key]!r}")


def _hints(target: Any) -> dict[str, Any]:
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    hints = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        try:
            # One by one: an annotation that exists for type checkers alone must not hide the others.
            hints[name] = typing.get_type_hints(
                types.SimpleNamespace(__annotations__={name: annotation}), function.__globals__
            )[name]
        except (NameError, TypeError, AttributeError, SyntaxError):
            continue
    return hints


SCALARS: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    Path: (str,),
    type(None): (type(None),),
}


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value from YAML can be meant for an annotation; what cannot be judged passes."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    kind = type(None) if hint is None else args[0] if origin is typing.Annotated else origin or hint
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    if kind is collections.abc.Callable:
        return callable(value)
    if not inspect.isclass(kind) or kind in (Any, object):
        return True
    if kind in SCALARS:
        return isinstance(value, SCALARS[kind]) and isinstance(value, bool) == (kind is bool)
    if issubclass(kind, collections.abc.Mapping):
        return isinstance(value, Mapping) and (len(args) < 2 or all(fits(item, args[1]) for item in value.values()))
    if issubclass(kind, (collections.abc.Sequence, collections.abc.Set)) or kind is collections.abc.Iterable:
        if not isinstance(value, (list, tuple)):
            return False
        if issubclass(kind, tuple) and args and ... not in args:
            return len(value) == len(args) and all(map(fits, value, args))
        return not args or all(fits(item, args[0]) for item in value)
    if getattr(kind, "_is_protocol", False):
        return all(hasattr(value, name) for name in vars(kind) if not name.startswith("_"))
    return isinstance(value, kind)  # of another class: only a node makes one


def expected(hint: Any) -> str:
    """Say an annotation in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(expected(arg) for arg in args))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    names: dict[Any, str] = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    if hint in names:
        return names[hint]
    if origin is not None and args:
        kind = "a list" if origin in (list, collections.abc.Sequence) else getattr(origin, "__name__", origin)
        return f"{kind} of {' and '.join(expected(arg) for arg in args if arg is not ...)}"
    return getattr(hint, "__name__", str(hint))


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain dicts and lists, interpolations resolved.

    Raises:
        ValueError: If a key was added that nothing reads, or one that must be given is missing or null, by its key.
    """
    _check_known(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} must be given; add {missing[0]}=... to the command")
    config = typing.cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))
    schema = OmegaConf.get_type(cfg)
    for entry in fields(schema) if is_dataclass(schema) else ():
        name, make = entry.name, entry.default_factory
        if (entry.default == MISSING or is_dataclass(make)) and config.get(name) is None:
            raise ValueError(f"{name} must be given, got {'null' if name in config else f'~{name}'}")
        config.setdefault(name, make() if callable(make) else entry.default)
    if is_dataclass(schema) and "method" in config:
        _check_method(config["method"] or {}, OmegaConf.to_yaml(cfg))
    return config


def _check_known(cfg: DictConfig, path: str = "") -> None:
    """Refuse a key that ``+`` added to a node of the schema."""
    schema = OmegaConf.get_type(cfg)
    if not is_dataclass(schema):
        return
    known = [entry.name for entry in fields(schema)]
    for name in map(str, cfg):
        if name not in known:
            close = [path + one for one in get_close_matches(name, known)]
            raise ValueError(
                f"{path}{name} is no key of the configuration; "
                + (f"did you mean {' or '.join(close)}?" if close else f"these are: {', '.join(known)}")
            )
        refers = OmegaConf.is_missing(cfg, name) or OmegaConf.is_interpolation(cfg, name)
        if not refers and isinstance(node := cfg[name], DictConfig):
            _check_known(node, f"{path}{name}.")


def _check_method(method: Mapping[str, Any], text: str) -> None:
    """Check that a method has a name, and that what stands beside it is read, as in ``${method.head_epochs}``.

    A shipped method's own keys may stay where what reads them was replaced, as by phases of one's own.

    Args:
        method: The node.
        text: The whole configuration with its interpolations.
    """
    name = method.get("name")
    if not isinstance(name, str):
        raise ValueError(f"method.name must be a name, got {'null' if name is None else name}; set method=fedavg")
    read = re.findall(r"\$\{method\.(\w+)", text)
    for key in map(str, method):
        if key != "name" and key not in read and key not in _shipped(name):
            close = [f"method.{one}" for one in get_close_matches(key, set(read))]
            hint = f"did you mean {' or '.join(close)}?" if close else f"leave it out, or ~method.{key} does"
            raise ValueError(f"method.{key} is read by no other key; {hint}")


def _shipped(method: str) -> set[str]:
    """Return the keys that the file of a method, and those that it begins with, have beside its name."""
    path = CONF / "method" / f"{method}.yaml"
    if not path.is_file():
        return set()
    file: Any = OmegaConf.load(path)
    before = [_shipped(one) for one in file.get("defaults", []) if isinstance(one, str)]
    return set(map(str, file.get("method", {}))).union(*before)


def differences(old: Any, new: Any, ignore: Iterable[str] = (), path: str = "") -> list[str]:
    """List in words where two configurations differ.

    Args:
        old: Plain dicts, lists and values.
        new: The same.
        ignore: Keys, with dots, below which differences do not matter.
        path: Where the two stand.
    """
    if path in set(ignore):
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        nested = (differences(old.get(k), new.get(k), ignore, f"{path}.{k}" if path else str(k)) for k in keys)
        return [line for lines in nested for line in lines]
    return [] if old == new else [f"{path} was {old!r}, now {new!r}"]
