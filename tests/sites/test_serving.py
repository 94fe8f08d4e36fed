"""The models of a run with sites are used at the sites: the predictions that arrive in files are those of the loop."""

from __future__ import annotations

import csv
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_lightning.callbacks.federated_evaluation import CHOOSING, FederatedEvaluation
from fl_lightning.evaluation.predict import batches_of
from fl_lightning.sites.predictions import Predictions
from fl_lightning.sites.serving import main, serve
from fl_lightning.state import load
from tests.federations import federation
from tests.sites.federation import SiteThread, free_port, run_at_sites, sites


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flexp_sfl", "pfsl", "fedper"])
def test_a_site_predicts_with_the_model_that_validation_chose(method: str, tiny_root: Path, tmp_path: Path) -> None:
    words = (f"method={method}", "seed=3", "loop.rounds=2", "model._target_=tests.federations.tiny_model")
    serial = federation(tiny_root, tmp_path / "serial", *words)
    with serial.open():
        serial.loop.run_rounds()
        loop = serial.loop
        evaluation = next(one for one in loop.federated_callbacks if isinstance(one, FederatedEvaluation))
        for view in CHOOSING:
            if view in evaluation.best:
                evaluation.restore(loop, view)
        bob = loop.clients[1]
        [scores] = loop.score([(bob, loop.personal_exam(bob, "test"))])
        load(serial.module, loop.personal_state(bob))
    x, y = (torch.cat(parts) for parts in zip(*batches_of(serial.clients[1].data, "test"), strict=True))
    serial.module.eval().to("cpu")
    with torch.no_grad():
        expected = serial.module.personal_forward(x)

    port, folder = free_port(), tmp_path / "server"
    with sites(port, tiny_root, tmp_path / "sites", patience=60.0):
        run_at_sites(tiny_root, folder, port, *words)
    port = free_port()
    listen = [f"executor.listen=127.0.0.1:{port}"]
    server = threading.Thread(target=serve, args=(folder, listen, 2, ["tests"]), daemon=True)
    server.start()
    for suffix in ("npz", "csv"):
        file = tmp_path / f"bob.{suffix}"
        site = SiteThread(port, tiny_root, tmp_path / "sites", "bob", patience=60.0, predictions=Predictions(file))
        site.join(60)
        assert site.error is None
    server.join(60)
    assert not server.is_alive()

    content = np.load(tmp_path / "bob.npz")
    places = serial.clients[1].data._indices.indices("test")
    own = places.argsort()
    assert (content["examples"] - content["examples"].min()).tolist() == (places[own] - places.min()).tolist()
    assert torch.allclose(torch.from_numpy(content["outputs"]), expected[own], atol=1e-5)
    assert content["targets"].tolist() == y[own].tolist()
    with (tmp_path / "bob.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert [int(line["example"]) for line in table] == content["examples"].tolist()
    right = sum(line["target"] == line["predicted"] for line in table)
    assert right / len(table) == pytest.approx(scores.values["accuracy"], abs=1e-7)
    sure = torch.from_numpy(content["outputs"]).softmax(1).max(1).values
    assert [float(line["probability"]) for line in table] == pytest.approx(sure.tolist(), abs=1e-6)


@pytest.mark.slow
def test_who_wants_to_predict_does_not_train(tiny_root: Path, tmp_path: Path) -> None:
    port = free_port()
    file = Predictions(tmp_path / "x.csv")
    site = SiteThread(port, tiny_root, tmp_path, "ann", patience=60.0, predictions=file)
    with pytest.raises(ValueError, match=r"site ann: it was started to predict \(--infer\), and the server trains"):
        run_at_sites(tiny_root, tmp_path / "server", port, number=1)
    site.join()
    assert "fl_lightning.serve" in str(site.error)
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(
    ("file", "split", "words"),
    [
        ("x.txt", "test", "must name a .csv or a .npz"),
        ("there.csv", "test", "is there already"),
        ("none/x.csv", "test", "folder that exists"),
        ("x.csv", "every", "--split must be one of"),
    ],
)
def test_a_file_that_cannot_be_is_refused_at_once(file: str, split: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "there.csv").touch()
    with pytest.raises(ValueError, match=words):
        Predictions(tmp_path / file, split)


def test_what_cannot_be_served_is_refused(tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="^error: .*holds no run"):
        main([str(tmp_path)])
