"""Models of transformers in blocks, and adapters on both halves, against the whole model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_lightning.models.adapters import Adapters
from fl_lightning.models.hf import hf
from fl_lightning.models.model import Model
from fl_lightning.module import FitContext
from fl_lightning.run.config import plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.overrides import composed
from fl_lightning.run.training import assemble
from fl_lightning.split.blocks import chain, check, run
from fl_lightning.split.module import SplitModule
from fl_lightning.split.part import keep_part, without_weights
from fl_lightning.task import Language
from tests.federations import assert_same
from tests.split.halves import SGD, connect, make_body, step, whole_state

transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")

LLAMA_LIKE = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2},
    "llama": {**LLAMA_LIKE, "num_hidden_layers": 3, "pad_token_id": None},
    "gemma3_text": {
        **{**LLAMA_LIKE, "num_hidden_layers": 7, "head_dim": 8},
        **{"sliding_window": 3, "pad_token_id": None},  # the last layer sees all, the others three tokens
    },
}


def make(name: str, padding: int | None = None, **more: Any) -> Model:
    torch.manual_seed(0)
    model = hf(11, image_size=8, config={"model_type": name, **CONFIGS[name]}, padding=padding, **more)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_applied_in_order_are_the_model(name: str) -> None:
    tokens = torch.randint(1, 11, (3, 8))
    tokens[0, 5:] = 0
    for padding in (None, 0):
        backbone = make(name, padding).backbone
        blocks = chain(backbone)
        check(blocks, backbone, tokens)
        backbone.eval()
        real = backbone.real(tokens) if padding == 0 else tokens >= 0
        torch.testing.assert_close(run(list(blocks.values()), tokens)[real], backbone(tokens)[real])
        block = copy.deepcopy(blocks["blocks.1"])  # carries its own weights alone
        assert sum(p.numel() for p in block.parameters()) < sum(p.numel() for p in backbone.parameters()) / 2


def test_a_padded_batch_gives_what_transformers_gives_with_a_mask() -> None:
    model = make("gpt2", padding=0, last=True)
    plain_model = model.backbone.__dict__["_model"].eval()
    tokens = torch.tensor([[0, 0, 0, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
    found = run(list(chain(model.backbone).values()), tokens)
    expected = plain_model(input_ids=tokens, attention_mask=(tokens != 0).long(), use_cache=False).logits[:, -1]
    torch.testing.assert_close(found, expected)


def test_models_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="model.kind must be causal"):
        chain(hf(3, config={"model_type": "bert", **LLAMA_LIKE, "num_hidden_layers": 1}, kind="sequence").backbone)
    opt = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    backbone = hf(11, image_size=8, config={**opt, "word_embed_proj_dim": 16}).backbone
    with pytest.raises(ValueError, match="cannot be applied in order"):
        check(chain(backbone), backbone, torch.ones(1, 4, dtype=torch.int64))


def adapted(end: int = -2) -> SplitModule:
    torch.manual_seed(0)
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    module = SplitModule(Adapters(rank=2).adapt(make("gpt2", tied=True)), start=1, end=end)
    module.task = Language()
    module.context = FitContext(SGD)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    return module


def test_adapters_on_both_halves_train_as_on_the_whole_model() -> None:
    """Two steps against the uncut model under the same SGD; the base stays, at the client and at the server."""
    batches = [(torch.randint(11, (2, 8)), torch.randint(11, (2, 8))) for _ in range(2)]
    whole, module = adapted(), adapted()
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    optimizer = SGD(whole.trained_parameters())
    for x, y in batches:
        optimizer.zero_grad()
        whole.loss((x, y)).backward()
        optimizer.step()
    for at in (1, 2):
        module = adapted()
        body = make_body(module)
        exchange = connect(module, body, at)
        client = module.configure_optimizers()
        for batch in batches:
            step(module, client, batch)
        found, expected = whole_state(module, body, exchange), whole.state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
            moved = not torch.equal(found[name], start[name])
            assert moved == (".lora_" in name), name


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_client_makes_its_part_alone(name: str) -> None:
    """With the weights of its own blocks it computes what the whole model does up to the cut and behind the end."""
    whole = SplitModule(make(name), end=-2).eval()
    config = {"model_type": name, **CONFIGS[name]}
    with without_weights():
        part = SplitModule(hf(11, image_size=8, config=config), end=-2).eval()
    cut = part.cut_at(1)
    keep_part(part, cut)
    held = set(whole.parts(cut).client)
    assert set(part.state_dict()) == held
    part.load_state_dict({key: tensor for key, tensor in whole.state_dict().items() if key in held})
    tokens, hidden = torch.randint(11, (2, 8)), torch.randn(2, 8, 16)
    ours, theirs = list(part.blocks.values()), list(whole.blocks.values())
    torch.testing.assert_close(run(ours[: cut.at], tokens), run(theirs[: cut.at], tokens))
    torch.testing.assert_close(run(ours[cut.end :], hidden), run(theirs[cut.end :], hidden))


def test_adapters_need_something_to_train_on_both_sides() -> None:
    with pytest.raises(ValueError, match=r"the client must have something to train, .* module.end=4 of 5 blocks"):
        adapted(end=-1)


def texts(folder: Path) -> Path:
    folder.mkdir()
    for name, shift in {"ann": 1, "bob": 2, "cid": 3}.items():
        lines = [{"prompt": f"{a} + {shift} =", "text": f" {(a + shift) % 10}"} for a in range(10)] * 3
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.slow
def test_flexp_sfl_trains_adapters_of_a_language_model_on_prompts(tmp_path: Path) -> None:
    """Only adapters travel with a fit; answers alone count; personal models are scored whole."""
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    digits = [ord(digit) for digit in "0123456789"]
    overrides = [
        "method=flexp_sfl", "model=hf", "model.config={model_type: gpt2, n_embd: 16, n_layer: 4, n_head: 2}",
        "model.adapters={rank: 2, targets: attention}", "module.end=-2", "split_policy=fixed", "task=language",
        f"task.choices={digits}", "evaluation.metric=choice_accuracy", "data=texts",
        f"data.root={texts(tmp_path / 'texts')}", "data.prompt=prompt", "data.length=10", "data.batch_size=4",
        "loop.rounds=2", "logger=none", "dashboard=null", "callbacks.everyone.every=1",
    ]  # fmt: skip
    federation = assemble(plain(composed("train", overrides)), RunFolder(tmp_path / "run"))
    federation.fit()
    loop, module = federation.loop, federation.module
    server = loop.callbacks["server"]
    assert [server.cuts[client.id].at for client in loop.clients] == [1, 2, 3]
    assert all(".lora_" in name for name in loop.state)
    assert all(".lora_" in name for client in federation.clients for name in client.personal)
    assert any(not torch.equal(loop.state[name], loop.local.initial[name]) for name in loop.state)
    base = {name: loop.local.initial[name] for name in module.base_names}
    assert_same(base, {name: module.state_dict()[name] for name in base})
    row = loop.history[-1]
    assert 0 <= row["personal_on/everyone"] <= 1
    assert 0 <= row["test/personal/choice_accuracy/mean"] <= 1


def gpt2_like(folder: Path) -> None:
    """Write weights and a tokenizer as transformers saves them, with the vocabulary's size and letters of GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = dict(zip("ABCD", (317, 347, 327, 360), strict=True))
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    vocabulary |= {f"Ġ{letter}": number for letter, number in letters.items()}
    taken = set(vocabulary.values())
    vocabulary |= {f"unused{number}": number for number in range(50256) if number not in taken}
    merges = [("Ġ", letter) for letter in letters]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 50256}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)
    config = transformers.GPT2Config(n_embd=8, n_layer=24, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.mark.slow
def test_the_authors_experiment_needs_only_weights_and_data(tmp_path: Path) -> None:
    """Here a folder of the same form, weights of a thousandth of the size, and prompts of at most 48 tokens."""
    gpt2_like(tmp_path / "weights")
    (tmp_path / "tasks").mkdir()
    for number in range(10):
        lines = [{"prompt": f"{k % 4} or not? Answer:", "text": " " + "ABCD"[k % 4]} for k in range(10)]
        (tmp_path / "tasks" / f"{number}_task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    overrides = [
        "experiment=split/gpt2_medium", f"model.name={tmp_path / 'weights'}", f"data.root={tmp_path / 'tasks'}",
        "data.length=48", "loop.rounds=1", "logger=none", "dashboard=null",
    ]  # fmt: skip
    federation = assemble(plain(composed("train", overrides)), RunFolder(tmp_path / "run"))
    federation.fit()
    server = federation.loop.callbacks["server"]
    assert (federation.module.start, federation.module.end) == (3, 23)
    assert [server.cuts[client.id].at for client in federation.clients] == [4, 4, 4, 4, 10, 10, 7, 7, 7, 7]
    assert 0 <= federation.loop.history[-1]["test/personal/choice_accuracy/mean"] <= 1
    activation = 48 * 8 * 4  # bytes of an example's
    assert server.traffic.activation_down == 10 * 3 * activation
    assert server.traffic.activation_up == 2 * 10 * 3 * activation  # every client aligns
