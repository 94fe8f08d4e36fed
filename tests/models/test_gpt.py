"""Language models: causality, the word that follows, padding."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fl_lightning.models import gpt
from fl_lightning.models.hf import hf
from fl_lightning.split.blocks import chain, run

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}


def test_position_sees_only_what_came_before() -> None:
    torch.manual_seed(0)
    model = gpt(num_classes=9, image_size=6, width=16, depth=2, num_heads=2)
    body = model.backbone[:-1]
    tokens = torch.randint(9, (2, 6))
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 9
    before, after = body(tokens), body(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_learns_a_successor() -> None:
    torch.manual_seed(0)
    model = gpt(num_classes=5, image_size=4, width=16, depth=1, num_heads=2)
    parameters = [*model.backbone.parameters(), *model.head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(60):
        x = torch.randint(5, (32, 4))
        loss = torch.nn.functional.cross_entropy(model.head(model.backbone(x)), (x[:, -1] + 1) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("kind", ["gpt", "gpt2"])
def test_padding_at_the_left_is_seen_by_nobody(kind: str) -> None:
    """The answer is that of the blocks without a mask to the real tokens alone, at the positions where they are."""
    if kind == "gpt2":
        pytest.importorskip("transformers", reason="the extra `text` is not installed")
    own = partial(gpt, num_classes=9, image_size=6, width=16, depth=2, num_heads=2)
    make = own if kind == "gpt" else partial(hf, 9, image_size=6, config=GPT2, last=True)
    models = []
    for padding in (0, None):
        torch.manual_seed(0)
        models.append(make(padding=padding).backbone.eval())
    padded, blocks = models[0], list(chain(models[1]).values())
    tokens = torch.tensor([[0, 0, 3, 0, 5, 1], [0, 0, 0, 0, 0, 7], [4, 2, 8, 1, 6, 3], [0, 0, 0, 0, 0, 0]])
    found = padded(tokens)
    for row, begin in enumerate((2, 5, 0)):  # a 0 behind a real token is a token
        torch.testing.assert_close(found[row : row + 1], run(blocks[1:], blocks[0](tokens[row : row + 1])[:, begin:]))
    assert torch.isfinite(found).all()
    assert not torch.allclose(found[:2], run(blocks, tokens[:2]), atol=1e-3)
    found[1].sum().backward()
    gradients = {name.split(".")[-2]: p.grad for name, p in chain(padded)["embed"].named_parameters()}
    assert not gradients["wte"][0].any()
    assert not gradients["wpe"][:5].any()


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="1 channel"):
        gpt(num_classes=5, in_channels=3)
    with pytest.raises(ValueError, match="`num_heads` must divide `width` 10, got 4"):
        gpt(num_classes=5, width=10)
    with pytest.raises(ValueError, match="a sequence of 7 tokens is longer than 6"):
        gpt(num_classes=5, image_size=6, width=8).backbone(torch.zeros(1, 7, dtype=torch.int64))
