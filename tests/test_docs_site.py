"""The documentation's own pages: what they show runs, what is made from the code is complete."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from fl_lightning.run.config import CONF
from fl_lightning.run.overrides import explain
from tests.federations import make_tiny_federation
from tests.scripts import call

ROOT = CONF.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import pages  # noqa: E402

sys.path.remove(str(DOCS))


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / "tutorials" / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "fair"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    return tmp_path


def test_the_tutorial_of_a_method(folder: Path) -> None:
    """Its files are written, its YAML is used from a folder of one's own, its tests pass."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks("write_a_method.md"):
        if found := re.match(r"# (\w+\.py)\n", block):
            (folder / found[1]).write_text(block)
        else:
            exec(compile(block, "write_a_method.md", "exec"), names)
    (written,) = re.findall(
        r"^```yaml\n(.*?)^```", (DOCS / "tutorials/write_a_method.md").read_text(), re.DOTALL | re.M
    )
    (folder / "conf" / "method").mkdir(parents=True)
    (folder / "conf" / "method" / "fedexp.yaml").write_text(written)
    make_tiny_federation(folder / "DIR", size=16)
    tiny = ["data=folder", "data.root=DIR", "loop.rounds=2", "logger=none", "dashboard=null"]
    assert call("train", "--config-dir", "conf", "method=fedexp", *tiny, "hydra.run.dir=run") == 0
    assert call("train", "module._target_=fair.Focal", "+module.gamma=1", *tiny, "hydra.run.dir=focal") == 0


def test_the_tutorial_of_data(folder: Path) -> None:
    (block,) = blocks("your_data.md")
    exec(compile(block, "your_data.md", "exec"), {})
    short = ["loop.rounds=1", "logger=none", "dashboard=null", "hydra.run.dir=run"]
    assert call("train", "data=folder", "data.root=DIR", "model=lenet5", *short) == 0


def test_the_tutorial_of_sites(folder: Path) -> None:
    """Its files are read by the simulation, and by the site that says what would leave."""
    (block,) = blocks("simulation_to_sites.md")
    exec(compile(block, "simulation_to_sites.md", "exec"), {})
    short = ["loop.rounds=1", "logger=none", "dashboard=null"]
    assert call("train", "data=folder", "data.root=DIR", "method=fedper", *short, "hydra.run.dir=run") == 0
    results = json.loads((folder / "run" / "results.json").read_text())
    assert [entry["name"] for entry in results["clients"]] == ["hospital_a", "hospital_b", "hospital_c"]


def test_the_reference_has_every_key_with_a_value() -> None:
    page = pages.configuration()
    assert "| `loop.rounds` | `20` | `int` |" in page
    assert "| `executor.workers` |" in page
    for name in ("train.yaml", "personalize.yaml"):
        roots = [
            key
            for key, value in yaml.safe_load((CONF / name).read_text()).items()
            if not isinstance(value, (dict, list))
        ]
        missing = [key for key in roots if f"| `{key}` |" not in page]
        assert not missing
    assert "| `loop.on_bad_update` | `raise` | `raise | drop` |" in page  # the words, no name for them
    assert "| `seed` | `1` | `int` |" in page
    assert {file.name for file in CONF.iterdir() if file.is_dir()} - {"comparison", "experiment", "hydra"} <= {
        group.split("/")[0] for group in pages.GROUPS
    }
    for method in (CONF / "method").glob("*.yaml"):
        assert f"### method={method.stem}" in page
    table = [line for line in page.splitlines() if line.startswith("| `")]
    # Pipes within code are no borders of cells.
    bare = [re.sub(r"`[^`]*`", "", line) for line in table]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in bare)


def sentences() -> list[str]:
    """The texts in the code, with an ellipsis for what is put into them."""
    found = []
    for file in (ROOT / "fl_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_sentences_of_troubleshooting_are_those_of_the_code() -> None:
    """Each is found in the code, what is put into it at "…" left open, or is said when provoked."""
    page = (DOCS / "reference" / "troubleshooting.md").read_text()
    written = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    provoked = {
        "there is no loop.round; did you mean loop.rounds?": ["loop.round=3"],
        "there is no method=fedavgg; did you mean method=fedavg or method=fedavgm or method=lg_fedavg?": [
            "method=fedavgg"
        ],
    }
    known = sentences()
    assert len(written) > 10
    for sentence in written:
        if words := provoked.pop(sentence, None):
            with (
                pytest.raises(ConfigCompositionException) as error,
                initialize_config_dir(str(CONF), version_base="1.3"),
            ):
                compose("train", words)
            assert explain(error.value, "train", words) == sentence
            continue
        parts = [part.strip() for part in sentence.split("…") if part.strip()]
        assert any(all(part in text for part in parts) for text in known), sentence
    assert not provoked


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_run(file: Path, folder: Path) -> None:
    """All cells, in order; with fewer rounds and epochs."""
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in json.loads(file.read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = re.sub(r"(rounds|epochs)=\d+", r"\1=1", "".join(cell["source"]))
            source = source.replace("executor=", "baselines={'local': {'epochs': 1}}, executor=")
            exec(compile(source, file.name, "exec"), names)
    assert (folder / "logs" / "train").is_dir()


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS)}" in text, f"{page} is in no menu of mkdocs.yml"


@pytest.mark.slow
def test_the_site_is_built_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path], cwd=ROOT, check=True)
    for page in tmp_path.rglob("*.html"):
        assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=.https?://(?!.*canonical)", page.read_text()), page
