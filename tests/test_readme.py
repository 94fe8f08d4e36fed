"""The README tells the truth: every method is in its table, every command runs, every link leads somewhere."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

import fl_lightning.personalization  # noqa: F401 - registers the schema of personalize.yaml
from fl_lightning.run.config import CONF
from tests.federations import make_tiny_federation
from tests.scripts import call

ROOT = CONF.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"python (train|personalize)\.py ([^\n`#]*)")
#: What comes last wins.
SHORT = {
    "train": ["loop.rounds=1", "trainer.max_epochs=1"],
    "personalize": ["epochs=1", "lp_epochs=1", "seeds=1", "curves.every=1"],
}
#: Pages whose commands stand on files that the page itself has one write; tests/test_docs_*.py run them.
APART = {"tasks.md", "write_a_method.md"}
SIZES = {"train": 1200, "test": 100}
COMMANDS = [
    (page.name, script, arguments.strip().removesuffix("\\"))
    for page in PAGES
    for script, arguments in COMMAND.findall(page.read_text().replace("\\\n", " "))
    if page.name not in APART and "…" not in arguments
]


@pytest.mark.parametrize("method", sorted(path.stem for path in (CONF / "method").glob("*.yaml")))
def test_every_method_is_in_the_table(method: str) -> None:
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert any(f"`{method}`" in line.split("|")[1] for line in table), f"{method} is not in the README's table"


@pytest.mark.every
@pytest.mark.parametrize(("page", "script", "arguments"), COMMANDS, ids=[" ".join(c) for c in COMMANDS])
def test_every_command_composes(page: str, script: str, arguments: str) -> None:
    # <timestamp>, RUN and the like stand for what the reader puts there.
    words = [re.sub(r"<[^>]*>", "x", word) for word in shlex.split(arguments)]
    given = [word for word in words if "=" in word and not word.startswith(("-", "hydra."))]
    overrides = [word for word in given if not word.endswith("=NAME")]
    if "-m" in words:  # of a sweep, the first job
        overrides = [word.partition(",")[0] for word in overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose(script, overrides)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a run for what stands in commands as DIR and RUN."""
    folder = tmp_path_factory.mktemp("documented")
    make_tiny_federation(folder / "DIR", size=16)
    rng = np.random.default_rng(0)
    (folder / "tokens").mkdir()
    for client in "ab":
        (folder / "tokens" / f"{client}.txt").write_bytes(rng.integers(97, 123, 600, dtype=np.uint8).tobytes())
    images = {f"x_{part}": rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8) for part, size in SIZES.items()}
    np.savez(folder / "cifar10.npz", **images, **{f"y_{part}": np.arange(size) % 10 for part, size in SIZES.items()})
    given = ["data=folder", f"data.root={folder / 'DIR'}", "model=lenet5", "loop.rounds=1"]
    assert call("train", *given, f"hydra.run.dir={folder / 'RUN'}") == 0
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL | re.MULTILINE)
    (folder / "mine.py").write_text(next(block for block in blocks if block.startswith("# mine.py")))
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=256, n_positions=256, n_embd=8, n_layer=4, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "FOLDER")
    return folder


def shortened(script: str, arguments: str, place: Path, folder: Path) -> list[str]:
    """Return the words of a command, with data, run folders and lengths of the test."""
    roots = {"data=tokens": "tokens", "data=texts": "tokens", "data=cifar10": "cifar10.npz", "data=npz": "cifar10.npz"}
    root = next((roots[word] for word in shlex.split(arguments) if word in roots), "DIR")
    known = {"data.root": place / root, "checkpoint": place / "RUN", "resume": folder}
    words = []
    for word in shlex.split(arguments):
        key = word.partition("=")[0]
        if word in ("checkpoint=FOLDER", "model.name=FOLDER"):
            words.append(f"{key}={place / 'FOLDER'}")
        elif word in ("trainer=gpu", "data.tokenizer=FOLDER") or key in (
            "hydra.run.dir",
            "data.unseen_clients",
            "beside",
        ):
            continue  # bytes are the folder's tokens; the test's clients have other names, and there is one run
        else:
            words.append(f"{key}={known[key]}" if key in known else word.replace("=NAME", "=fedavg"))
    if "data=cifar10" in words:
        words += [f"data.root={known['data.root']}", "data.num_clients=10"]
    if "--help" in words or "resume=" in arguments:
        return words
    where = "hydra.sweep.dir" if "-m" in words else "hydra.run.dir"
    # FedRep's phases take eleven epochs.
    short = [word for word in SHORT[script] if "method=fedrep" not in words or not word.startswith("trainer")]
    return [*words, *short, f"{where}={folder}"]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "script", "arguments"), COMMANDS, ids=[" ".join(c) for c in COMMANDS])
def test_every_command_runs(
    page: str, script: str, arguments: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "executor=ray" in arguments:
        pytest.skip("needs a cluster; tests/executors/test_ray_cluster.py starts one")
    if "executor=sites" in arguments:
        pytest.skip("waits for sites; tests/sites starts them")
    if ("DeviceMonitor" in arguments or "executor.graph=true" in arguments) and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    folder = tmp_path / "run"
    if "resume=" in arguments:
        shutil.copytree(place / "RUN", folder)
    words = shortened(script, arguments, place, folder)
    assert call(script, *words) == 0
    several = [word.count(",") + 1 for word in shlex.split(arguments) if re.fullmatch(r"[\w.]+=[\w.,]+", word)]
    jobs = [folder / str(number) for number in range(math.prod(several))] if "-m" in words else [folder]
    assert "--help" in words or all((job / "results.json").is_file() for job in jobs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        # The reference of keys is made when the site is built.
        if not target.startswith("http") and not target.endswith("reference/configuration.md"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
