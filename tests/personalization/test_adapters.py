"""Strategies that train adapters beside the model: what trains, what comes out, and that peft reads it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fl_lightning.evaluation.results import read_json
from fl_lightning.models import vit
from fl_lightning.models.hf import hf
from fl_lightning.models.prompts import Prompt
from fl_lightning.module import FederatedModule
from fl_lightning.personalization.run import run as personalize
from tests.models.test_hf import TINY
from tests.personalization.conftest import compose_personalization

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Personalized = Callable[..., tuple[Any, Path]]


def base(kind: str, folder: Path) -> Any:
    """Save a tiny language model or classifier, over bytes, into a folder."""
    torch.manual_seed(0)
    if kind == "causal":
        known = {**TINY["gpt2"], "vocab_size": 256, "n_positions": 32, "initializer_range": 0.5}
        plain = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**known))
    else:
        known = {**TINY["bert"], "num_labels": 2, "initializer_range": 0.5}  # attention matters
        plain = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(**known))
    plain.save_pretrained(folder)
    return plain.eval()


def data(kind: str, folder: Path) -> list[str]:
    folder.mkdir()
    for name in ("ann", "bob"):
        rows = [f'{{"text": "{name} {number}", "kind": {number % 2}}}' for number in range(30)]
        text = "\n".join(rows) if kind == "sequence" else f"{name} says what {name} said. " * 12
        (folder / f"{name}.{'jsonl' if kind == 'sequence' else 'txt'}").write_text(text)
    return ["data=texts", f"data.root={folder}", "data.length=12", *(["data.label=kind"] * (kind == "sequence"))]


@pytest.mark.parametrize(
    ("strategy", "kind", "count"),
    [
        ("lora_ft", "causal", 4 * (8 + 24) + 4 * (8 + 8)),  # c_attn and c_proj; the head is tied
        ("dora_ft", "causal", 4 * (8 + 24) + 4 * (8 + 8) + 24 + 8),  # and a length for each output
        pytest.param("dora_ft", "sequence", 4 * 4 * (8 + 8) + 4 * 8 + 2 * 8 + 2, marks=pytest.mark.every),
        pytest.param("lora_soup_ft", "causal", 12 * (8 + 24) + 12 * (8 + 8), marks=pytest.mark.every),
        ("lora_soup_ft", "sequence", 4 * 12 * (8 + 8) + 2 * 8 + 2),  # three times the rank
        ("prompt_ft", "causal", 8 * 8),
        ("prompt_ft", "sequence", 8 * 8 + 2 * 8 + 2),  # and the head
    ],
)
def test_peft_reads_each_clients_adapters_and_they_alone_trained(
    strategy: str, kind: str, count: int, tmp_path: Path
) -> None:
    plain = base(kind, tmp_path / "base")
    words = [f"checkpoint={tmp_path / 'base'}", f"personalization=[{strategy}]", "save_models=true", "optimizer=adam"]
    cfg = compose_personalization(*words, *data(kind, tmp_path / "texts"))
    personalize(cfg, tmp_path / "run")
    folder = tmp_path / "run/models" / strategy / "seed_0"
    x, seen = torch.randint(1, 255, (3, 12)), {}
    if kind == "sequence":
        x[0, -3:] = 0  # padding
        seen = {"attention_mask": (x != 0).long()}
    found = []
    for client in (0, 1):
        tensors = load_file(folder / f"client_{client}/adapter_model.safetensors")
        assert sum(tensor.numel() for tensor in tensors.values()) == count
        read = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(folder / f"client_{client}")).eval()
        found.append(read(x, **seen).logits[:, -12:] if kind == "causal" else read(x, **seen).logits)
        saved = torch.load(folder / f"client_{client}.pt", weights_only=True)
        prompt = saved.pop("prompt", None)
        model = hf(256 if kind == "causal" else 2, image_size=12, name=str(tmp_path / "base"), kind=kind)  # type: ignore[arg-type]
        if prompt is not None:
            model = Prompt(len(prompt)).adapt(model)
            saved["prompt"] = prompt
        module = FederatedModule(model).eval()
        head = {
            name.removeprefix(f"{module.head_path}."): saved.pop(name)
            for name in [*saved]
            if name.startswith(f"{module.head_path}.")
        }
        module.backbone.load_state_dict(saved)
        module.head.load_state_dict(head)
        torch.testing.assert_close(found[-1], module(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[-1], plain(x, **seen).logits, atol=1e-5)
    assert not torch.allclose(found[0], found[1])
    rows = read_json(tmp_path / "run/results.json")["methods"]
    assert rows["none"]["feature_distortion"] == 0 < rows[strategy]["feature_distortion"]


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_prompt_of_images_is_seen_by_all_blocks_and_zeros_are_none(pool: str) -> None:
    def make() -> FederatedModule:
        torch.manual_seed(0)
        return FederatedModule(vit(3, image_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2)).eval()

    plain, x = make(), torch.rand(2, 3, 8, 8)
    for module in (plain, prompted := make()):
        module.backbone.global_pool = pool
    model: Any = prompted
    Prompt(5).adapt(model)
    assert prompted.backbone.prompt.shape == (5, 8)
    trained = {name for name, parameter in prompted.named_parameters() if parameter.requires_grad}
    assert trained == {"backbone.prompt", "head.weight", "head.bias"}
    # The oracle: the tokens stand among the patches in plain blocks.
    inner: Any = plain.backbone
    z = inner._pos_embed(inner.patch_embed(x))
    z = inner.blocks(torch.cat([z, prompted.backbone.prompt.expand(2, -1, -1)], 1))[:, :5]
    torch.testing.assert_close(prompted(x), plain.head(inner.forward_head(inner.norm(z))))
    copied = copy.deepcopy(prompted)
    with torch.no_grad():
        copied.backbone.prompt.zero_()
    torch.testing.assert_close(copied(x), plain(x))
    assert not torch.allclose(prompted(x), plain(x))


@pytest.mark.every
def test_prompts_of_images_personalize(tiny_root: Path, tmp_path: Path) -> None:
    vision = ["~model", "+model._target_=fl_lightning.models.vit", "+model.patch_size=4", "+model.embed_dim=8"]
    vision += ["+model.depth=1", "+model.num_heads=2"]
    module = FederatedModule(vit(3, in_channels=3, image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2))
    torch.save(module.state_dict(), tmp_path / "vit.pt")
    words = [f"checkpoint={tmp_path / 'vit.pt'}", "data=folder", f"data.root={tiny_root}", *vision]
    chosen = ["personalization=[prompt_ft,ft,lora_ft]", "personalization.prompt_ft.adapters.prompt=3"]
    results = personalize(compose_personalization(*words, *chosen), tmp_path / "run")
    again = personalize(compose_personalization(*words, "personalization=[ft]"), tmp_path / "alone")
    rows, alone = results["methods"], again["methods"]
    assert rows["ft"]["local"] == alone["ft"]["local"]  # what shares the model's weights leaves them as they are
    assert rows["ft"]["train_loss"] == alone["ft"]["train_loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["personalization.prompt_ft.adapters.prompt=0"],
            "personalization.prompt_ft.adapters.prompt must be a whole number",
        ),
        ([], "personalization.prompt_ft.adapters.prompt must be null but for texts .* got Sequential"),
        (["+personalization.prompt_ft.start=random"], "adapters must be null where start is random"),
        (["personalization.prompt_ft.adapters=3"], "personalization.prompt_ft.adapters must be null or a mapping"),
    ],
)
def test_wrong_prompts_are_one_sentence(words: list[str], message: str, personalized: Personalized) -> None:
    with pytest.raises(ValueError, match=message):
        personalized("personalization=[prompt_ft]", *words)
