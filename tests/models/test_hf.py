"""Models of transformers and texts as data, held against transformers itself; nothing is downloaded."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_lightning.callbacks.freeze_schedule import FreezeSchedule
from fl_lightning.client import Scores
from fl_lightning.data.sets.texts import IGNORED, Texts
from fl_lightning.evaluation.named_metrics import Mean
from fl_lightning.evaluation.predict import Metrics
from fl_lightning.evaluation.results import MetricsTable, read_json
from fl_lightning.models import vit
from fl_lightning.models.adapters import Adapters, save_peft
from fl_lightning.models.hf import hf
from fl_lightning.module import FederatedModule
from fl_lightning.task import Language
from tests.models.test_adapters import randomize
from tests.scripts import call

transformers = pytest.importorskip("transformers")

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {
        **{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0},
    },
    "bert": {
        **{"model_type": "bert", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "vocab_size": 300, "pad_token_id": 0},
    },
    "vit": {
        **{"model_type": "vit", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "patch_size": 4},
    },
}


def tokens(vocabulary: int = 11, length: int = 6) -> Tensor:
    return torch.randint(1, vocabulary, (4, length))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_language_model_answers_for_every_token_and_survives_pickling(name: str) -> None:
    module = FederatedModule(hf(11, config=TINY[name], kind="causal"), task=Language()).eval()
    x = tokens()
    assert module(x).shape == (4, 6, 11)
    changed = x.clone()
    changed[:, -1] = 1
    torch.testing.assert_close(module(x)[:, :-1], module(changed)[:, :-1])
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), module(x))


def test_padding_changes_no_class() -> None:
    model = hf(3, config=TINY["bert"], kind="sequence")
    module = FederatedModule(model).eval()
    x = tokens()
    torch.testing.assert_close(module(functional.pad(x, (0, 5))), module(x))


def test_from_a_folder_it_is_the_model_that_was_saved(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(**{**TINY["gpt2"], "vocab_size": 11})
    plain = transformers.AutoModelForCausalLM.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    module = FederatedModule(hf(11, name=str(tmp_path)), task=Language()).eval()
    x = tokens()
    torch.testing.assert_close(module(x), plain(x).logits)
    targets = torch.cat([x[:, 1:], torch.full((4, 1), IGNORED)], 1)
    torch.testing.assert_close(module.criterion(module(x), targets), plain(x, labels=x).loss)
    assert {name.removeprefix("backbone.") for name in module.state_dict() if name.startswith("backbone.")} <= {
        *plain.state_dict()
    }


def test_images(tmp_path: Path) -> None:
    module = FederatedModule(hf(5, 3, 8, config=TINY["vit"], kind="image"))
    assert module(torch.rand(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": TINY["gpt2"], "kind": "text"}, "kind must be one of causal, sequence, image"),
        ({"config": {"n_embd": 8}}, "config must hold a model_type"),
        ({"config": {"model_type": "gpt22"}}, "config must describe a model of kind=causal"),
        (
            {"config": {"model_type": "gpt2"}, "kind": "image"},
            "config must describe a model of kind=image, got .{,300}$",
        ),
        ({"config": TINY["gpt2"], "kind": "sequence"}, "padding must be the token that fills up shorter texts"),
        ({"name": "/no/such"}, "name must be a folder, or a name on the hub, got /no/such, which is not there"),
        ({"config": TINY["gpt2"], "in_channels": 3}, "kind must be image for images of 3 channels"),
        ({"config": {**TINY["gpt2"], "vocab_size": 12}}, "knows 12 tokens, and the data have 11"),
        ({"config": TINY["gpt2"] | {"n_positions": 16}, "image_size": 32}, "at most 16 tokens for this model, got 32"),
    ],
)
def test_bad_input_is_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf(11, **arguments)


def test_a_folder_without_a_model_and_a_missing_library(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="model.name=.* cannot be loaded as AutoModelForCausalLM"):
        hf(11, name=str(tmp_path))
    with mock.patch.dict("sys.modules", transformers=None), pytest.raises(ImportError, match=r"fl_lightning\[text\]"):
        hf(11, config=TINY["gpt2"])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["timm", "gpt2"])
def test_peft_reads_the_folder_of_adapters_with_equal_outputs(kind: str, dora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def make() -> tuple[Any, FederatedModule]:
        torch.manual_seed(0)
        if kind == "gpt2":
            config = transformers.AutoConfig.for_model(**{**TINY["gpt2"], "vocab_size": 11, "use_cache": False})
            plain: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
            plain.save_pretrained(tmp_path / "base")
            model = hf(11, name=str(tmp_path / "base"))
        else:
            import timm

            small = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
            plain = timm.models.vision_transformer.VisionTransformer(**small)
            model = vit(3, image_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, mlp_ratio=4)
            parts = plain.state_dict()
            model.head.load_state_dict({key: parts[f"head.{key}"] for key in ("weight", "bias")})
            model.backbone.load_state_dict({key: value for key, value in parts.items() if not key.startswith("head.")})
        return plain, FederatedModule(Adapters(rank=2, dora=dora).adapt(model))

    plain, module = make()
    module.eval()
    randomize(module)
    if kind == "timm":
        with torch.no_grad():
            module.head.weight.normal_()
    assert save_peft(tmp_path / "adapter", module, module.state_dict(), module.head_path)
    read = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    x = tokens() if kind == "gpt2" else torch.rand(2, 3, 8, 8)
    out = read(x)
    torch.testing.assert_close(module(x), out.logits if kind == "gpt2" else out)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients of lines with a question, an answer and a kind, and a tokenizer of their words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("corpus")
    (folder / "lines").mkdir()
    lines = {
        name: [
            {"prompt": f"{name} says", "text": f"number {number % 4} and {number % 3}", "kind": "ab"[number % 2]}
            for number in range(20)
        ]
        for name in ("ann", "bob")
    }
    for name, rows in lines.items():
        (folder / "lines" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = Tokenizer(models.WordLevel(unk_token="[unk]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    every = [f"{row['prompt']} {row['text']}" for rows in lines.values() for row in rows]
    made.train_from_iterator(every, trainers.WordLevelTrainer(special_tokens=["[unk]"]))
    made.save(str(folder / "tokenizer.json"))
    return folder


def texts(corpus: Path, **options: Any) -> Texts:
    given = {"root": str(corpus / "lines"), "tokenizer": str(corpus / "tokenizer.json"), "length": 8}
    return Texts(**{**given, **options})


def test_targets_are_the_next_tokens_and_a_prompt_does_not_count(corpus: Path) -> None:
    data = texts(corpus, prompt="prompt", val_fraction=0)
    x, y = data.clients[0].examples("train")
    assert x.shape == y.shape == (16, 8)
    assert (y[:, 0] == IGNORED).all()  # the second word of the prompt
    assert torch.equal(y[:, 1:4], x[:, 2:5].long())
    assert (y[:, 5:] == IGNORED).all()
    assert data.clients[0].num_test == 4
    plain = texts(corpus, val_fraction=0).clients[0].examples("train")[1]
    assert (plain[:, 0] != IGNORED).all()
    batch = next(iter(data.clients[0].train_dataloader()))
    assert (batch[0].dtype, batch[1].shape) == (torch.int64, (16, 8))


def test_a_plain_text_is_cut_into_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstu")
    x, y = texts(tmp_path, root=str(tmp_path), tokenizer=None, length=5, val_fraction=0).clients[0].examples("train")
    assert bytes(x[0].tolist()) == b"abcde"
    assert bytes(y[0].tolist()) == b"bcdef"
    assert bytes(x[1].tolist()) == b"fghij"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"length": 2},
            "at most 3 tokens with data.length=2, got 4; raise data.length, or set data.longer=cut or windows",
        ),
        ({"text": "body"}, "must have the field 'body', and has prompt, text, kind; set data.body"),
        ({"tokenizer": "."}, "data.tokenizer=. cannot be loaded"),
        ({"tokenizer": "./no/such.json"}, "data.tokenizer must be a folder, .* got ./no/such.json, which is not there"),
        ({"longer": "drop"}, "longer must be one of refuse, cut, windows"),
        ({"length": 0}, "length must be a whole number of at least 1"),
    ],
)
def test_wrong_texts_are_one_sentence(options: dict[str, Any], message: str, corpus: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("data.body", "data.")):
        texts(corpus, **options)


def test_a_language_model_with_adapters_as_a_user_types_it(corpus: Path, tmp_path: Path) -> None:
    words = ["task=language", "data=texts", f"data.root={corpus / 'lines'}", "data.length=8", "data.prompt=prompt"]
    words += [
        f"data.tokenizer={corpus / 'tokenizer.json'}",
        "model=hf",
        "model.config.n_embd=8",
        "model.config.n_head=2",
    ]
    words += ["model.config.n_layer=1", "method=fedit", "loop.rounds=2", f"hydra.run.dir={tmp_path}", "logger=none"]
    assert call("train", *words, "dashboard=null") == 0
    results = read_json(tmp_path / "results.json")
    row = MetricsTable(tmp_path / "metrics.csv").rows[-1]
    assert results["metric"] == "perplexity"
    for client in results["clients"]:
        values = client["metrics"]["global"]
        assert values["perplexity"] == pytest.approx(math.exp(values["loss"]), rel=1e-4)
    assert row["lora/aggregation_error"] >= 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert results["lora"]["aggregation_error"] is not None


def test_classes_of_texts(corpus: Path, tmp_path: Path) -> None:
    words = ["data=texts", f"data.root={corpus / 'lines'}", "data.length=8", "data.label=kind", "model=hf"]
    words += [f"data.tokenizer={corpus / 'tokenizer.json'}", "model.kind=sequence", "~model.config", "logger=none"]
    words += [f"+model.config={{{', '.join(f'{key}: {value}' for key, value in TINY['bert'].items())}}}"]
    assert call("train", *words, "loop.rounds=1", "dashboard=null", f"hydra.run.dir={tmp_path}") == 0
    assert read_json(tmp_path / "results.json")["metric"] == "accuracy"


def test_a_head_of_tied_weights_is_probed_once_it_has_its_own() -> None:
    freeze = FreezeSchedule([{"train": ["head"]}])
    trainer = mock.Mock(max_epochs=1, max_steps=-1)
    with pytest.raises(ValueError, match="with backbone.transformer.wte.weight .* model.tied=false"):
        freeze.check(FederatedModule(hf(11, config=TINY["gpt2"])), trainer)
    model = hf(11, config=TINY["gpt2"], tied=False)
    freeze.check(FederatedModule(model), trainer)
    assert torch.equal(model.head.weight, model.backbone.transformer.wte.weight)
    assert model.head.weight is not model.backbone.transformer.wte.weight


def test_a_model_may_have_a_few_more_rows_than_its_tokenizer_has_tokens() -> None:
    module = FederatedModule(hf(250, config={**TINY["gpt2"], "vocab_size": 256}), task=Language())
    x = tokens(250)
    module.task.check(module(x), x, 250)
    assert module(x).shape[-1] == 256


def test_an_answer_is_right_where_all_its_tokens_are() -> None:
    targets = torch.tensor([[IGNORED, 1, 2], [IGNORED, 1, 2], [IGNORED] * 3, [0, IGNORED, IGNORED]])
    guesses = torch.tensor([[2, 1, 2], [0, 1, 1], [0, 0, 0], [0, 1, 1]])
    outputs = functional.one_hot(guesses, 3).float()
    metrics = Metrics(dict.fromkeys(["exact_match", "accuracy"]), Language())
    expected = {"exact_match": pytest.approx(2 / 3), "accuracy": pytest.approx(4 / 5)}
    assert metrics.of_outputs(outputs, targets, ["exact_match", "accuracy"], 3) == expected

    class Data:
        num_classes = 3

        def test_dataloader(self) -> Any:
            return [(outputs[:3], targets[:3]), (outputs[3:], targets[3:])]

    values, totals, _ = metrics.score(lambda x: x, Data())  # type: ignore[arg-type]
    assert values == expected
    pooled = metrics.pooled([Scores(0, 4, values, totals, None, None)] * 2, 3)
    assert pooled == expected


def test_an_exact_match_is_what_the_model_would_write() -> None:
    torch.manual_seed(0)
    module = FederatedModule(hf(11, config=TINY["gpt2"]), task=Language()).eval()
    x = tokens()
    for _ in range(3):  # write three tokens, the likeliest each time
        x = torch.cat([x, module(x)[:, -1:].argmax(-1)], 1)
    targets = torch.cat([torch.full((4, 5), IGNORED), x[:, 6:]], 1)
    exact = Language().metrics["exact_match"]
    assert isinstance(exact, Mean)
    assert exact.add(module(x[:, :-1]), targets) == 4
    targets[0, -1] = (targets[0, -1] + 1) % 11
    assert exact.add(module(x[:, :-1]), targets) == 3


def test_rows_of_a_parquet_are_the_lines_of_a_jsonl(corpus: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for path in (corpus / "lines").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{path.stem}.parquet")
    one, other = texts(corpus, prompt="prompt"), texts(corpus, prompt="prompt", root=str(tmp_path))
    for first, second in zip(one.clients, other.clients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first.examples("train"), second.examples("train"), strict=True))
    with pytest.raises(ValueError, match="row 1: must have the field 'body', and has prompt, text, kind; "):
        texts(corpus, root=str(tmp_path), text="body")
    (tmp_path / "ann.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="ann.parquet is damaged, or no parquet file"):
        texts(corpus, root=str(tmp_path))


def test_a_parquet_without_pyarrow_names_the_extra(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "ann.parquet").write_bytes(b"")
    with mock.patch.dict("sys.modules", pyarrow=None), pytest.raises(ImportError, match=r"fl_lightning\[text\]"):
        texts(corpus, root=str(tmp_path))
