"""All the things that ``checkpoint=`` may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from fl_lightning.callbacks.checkpoint import FORMAT
from fl_lightning.models.export import import_state_dict, read_global_model
from fl_lightning.personalization.run import _fresh_weights
from fl_lightning.personalization.source import open_source
from fl_lightning.run.config import plain
from tests.personalization.conftest import compose_personalization

MODEL = ["~model", "+model._target_=tests.federations.tiny_model"]


def write(kind: str, state: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write a global model in one of the forms that the world uses."""
    own = import_state_dict(state, "head")
    contents: dict[str, Any] = {
        "plain.pt": state,
        "own.pt": own,
        "lightning.ckpt": {"state_dict": own, "epoch": 3, "pytorch-lightning_version": "2.6.6"},
        "wrapped.ckpt": {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}},
        "last.pt": {"format": FORMAT, "round": 3, "state": own},
    }
    path = folder / kind
    if kind == "plain.safetensors":
        save_file(state, path)
    else:
        torch.save(contents[kind], path)
    return path


@pytest.mark.parametrize(
    "kind", ["plain.pt", "own.pt", "lightning.ckpt", "wrapped.ckpt", "last.pt", "plain.safetensors"]
)
def test_every_file_gives_the_same_model(kind: str, trained: Path, tiny_root: Path, tmp_path: Path) -> None:
    path = write(kind, torch.load(trained / "global_model.pt", weights_only=True), tmp_path)
    cfg = compose_personalization(f"checkpoint={path}", "data=folder", f"data.root={tiny_root}", *MODEL)
    source = open_source(plain(cfg))
    reference = open_source(plain(compose_personalization(f"checkpoint={trained}")))
    expected = reference.module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in source.module.state_dict().items())


def test_a_head_of_other_classes_is_replaced(trained: Path, tiny_root: Path, tmp_path: Path) -> None:
    state = torch.load(trained / "global_model.pt", weights_only=True)
    torch.save(state | {"head.weight": torch.ones(9, 16), "head.bias": torch.ones(9)}, tmp_path / "nine.pt")
    given = [f"checkpoint={tmp_path / 'nine.pt'}", "data=folder", f"data.root={tiny_root}", *MODEL]
    with pytest.raises(ValueError, match="head.weight .9, 16.*; set new_head=true"):
        open_source(plain(compose_personalization(*given)))
    module = open_source(plain(compose_personalization(*given, "new_head=true"))).module
    assert torch.equal(module.backbone.conv1.weight, state["conv1.weight"])
    assert module.head.weight.shape == (3, 16)


def test_a_run_says_what_it_is(trained: Path, personalized: Callable[..., tuple[Any, Path]]) -> None:
    results, folder = personalized("personalization=[lp]", "batch_size=5", "save_models=true")
    assert results["source"]["kind"] == "run folder"
    assert results["source"]["method"] == "fedavg"
    assert (folder / "partition.json").read_text() == (trained / "partition.json").read_text()


def test_a_timm_model_needs_no_federation(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    create = timm.create_model

    def offline(name: str, pretrained: bool, **arguments: Any) -> torch.nn.Module:
        asked.append(pretrained)
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    cfg = compose_personalization("checkpoint=resnet10t.c3_in1k", "data=folder", f"data.root={tiny_root}")
    source = open_source(plain(cfg))
    assert asked == [True]
    assert source.module.head.out_features == 3
    assert source.description["kind"] == "timm, pretrained"


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": 1}}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="is not the state dict of a model"):
        read_global_model(tmp_path / "odd.pt", "head")
    (tmp_path / "odd.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged, or no safetensors"):
        read_global_model(tmp_path / "odd.safetensors", "head")


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Write a small vision transformer of transformers into a folder, for some classes or without a head."""
    transformers = pytest.importorskip("transformers")

    def save(classes: int | None, name: str = "vit") -> tuple[Path, Any]:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=classes or 2, **sizes)
        kind = transformers.ViTForImageClassification if classes else transformers.ViTModel
        plain = kind(config).eval()
        plain.save_pretrained(tmp_path / name)
        return tmp_path / name, plain

    return save


def test_a_folder_of_transformers_is_the_model_that_was_saved(saved: Any, tiny_root: Path, tmp_path: Path) -> None:
    folder, plain = saved(3)
    given = [f"checkpoint={folder}", "data=folder", f"data.root={tiny_root}"]
    config = plain_config(*given)
    source = open_source(config)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(source.module.eval()(x), plain(x).logits)
    again = open_source(plain_config(*given, "model=hf", "model.kind=image"))
    assert all(torch.equal(tensor, again.module.state_dict()[n]) for n, tensor in source.module.state_dict().items())
    start, trained = _fresh_weights(source, config, 0), source.module.state_dict()
    assert not any(torch.equal(start[name], trained[name]) for name in start if name.endswith("query.weight"))
    fresh = open_source(plain_config(*given, "new_head=true"))
    assert torch.equal(
        trained["backbone.vit.layernorm.weight"], fresh.module.state_dict()["backbone.vit.layernorm.weight"]
    )
    assert not torch.equal(fresh.module.head.weight, source.module.head.weight)


def plain_config(*overrides: str) -> dict[str, Any]:
    return plain(compose_personalization(*overrides))


def test_a_head_that_a_folder_lacks_is_asked_for(saved: Any, tiny_root: Path) -> None:
    data = ["data=folder", f"data.root={tiny_root}"]
    four, _ = saved(4, "four")
    none, _ = saved(None, "none")
    with pytest.raises(ValueError, match="a head of 4 classes, and the data have 3; set new_head=true"):
        open_source(plain_config(f"checkpoint={four}", *data))
    assert open_source(plain_config(f"checkpoint={four}", *data, "new_head=true")).module.head.out_features == 3
    with pytest.raises(
        ValueError, match="no head for classes or tokens; set model=hf model.kind=sequence or image, and"
    ):
        open_source(plain_config(f"checkpoint={none}", *data))
    image = ["model=hf", "model.kind=image"]
    with pytest.raises(ValueError, match="no head for classes, and the data have 3; set new_head=true"):
        open_source(plain_config(f"checkpoint={none}", *data, *image))
    assert open_source(plain_config(f"checkpoint={none}", *data, *image, "new_head=true")).module.head.out_features == 3
    with pytest.raises(ValueError, match="is a model of transformers, without clients; add data="):
        open_source(plain_config(f"checkpoint={four}"))
    with pytest.raises(ValueError, match="leave out model=, or set model=hf"):
        open_source(plain_config(f"checkpoint={four}", *data, "model=cnn2"))
    with pytest.raises(ValueError, match="begin with it by model=hf model.name="):
        read_global_model(four, "classifier")


@pytest.mark.parametrize("word", ["data.batch_size=3", "+data.strange=1"])
def test_settings_of_data_at_sites_are_the_runs(word: str, trained: Path) -> None:
    for executor in ("sites", "hosted"):
        cfg = compose_personalization(f"checkpoint={trained}", f"executor={executor}", word, "seed=5")
        key, _, value = word.lstrip("+").partition("=")
        with pytest.raises(ValueError, match=f"{key} must be left out, got {value}; sites read their data as the run"):
            open_source(plain(cfg))
