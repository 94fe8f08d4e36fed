"""Merging adapters, held against the dense mean of the clients' weights, written out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fl_lightning.callback import FederatedCallback
from fl_lightning.models.adapters import adapted_layers
from fl_lightning.models.export import export_state_dict
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.results import finish
from fl_lightning.run.training import Federation
from fl_lightning.state import State, num_bytes
from tests.federations import config, federation
from tests.models.test_compact import VIT

pytest.importorskip("peft")

EXACT = ["ffa_lora", "rolora", "flora", "fedex_lora", "flexlora"]  # at rank 4 the tiny model's weights are full


class Watch(FederatedCallback):
    """Keeps, for each round, the state before and after, what went down, and what each client sent."""

    def __init__(self) -> None:
        self.before: list[State] = []
        self.after: list[State] = []
        self.updates: list[list[tuple[int, State]]] = []
        self.down: list[list[State]] = []

    def on_round_start(self, loop: Any, cohort: Any) -> None:
        self.before.append(dict(loop.state))
        self.updates.append([])
        self.down.append([])

    def on_broadcast(self, loop: Any, client: Any, broadcast: Any) -> None:
        self.down[-1].append({**broadcast.state, **broadcast.extra})

    def on_update(self, loop: Any, client: Any, update: Any) -> None:
        self.updates[-1].append((update.num_examples, dict(update.state)))

    def on_aggregate_end(self, loop: Any) -> None:
        self.after.append(dict(loop.state))


def train(tiny_root: Path, folder: Path, method: str, *overrides: str) -> tuple[Federation, Watch]:
    run = federation(tiny_root, folder, f"method={method}", "seed=3", *overrides)
    watch = Watch()
    run.loop.add_callback("watch", watch)
    run.fit()
    return run, watch


def weights(run: Federation, state: State) -> dict[str, Tensor]:
    """The weights of the adapted layers with their adapters, as plain matrices."""
    found = {}
    for layer in adapted_layers(run.module):
        known = {**run.loop.initial, **state}
        base, a, b = (known[name].double().flatten(1) for name in (layer.weight, layer.a, layer.b))
        found[layer.name] = base + layer.scale * b @ a
    return found


def errors(run: Federation, watch: Watch) -> list[float]:
    """How far each round's merged weights are from the dense mean, as a share of the round's mean change."""
    found = []
    for before, after, updates in zip(watch.before, watch.after, watch.updates, strict=True):
        total = sum(number for number, _ in updates)
        start, merged = weights(run, before), weights(run, after)
        sent = [(number / total, weights(run, {**before, **state})) for number, state in updates]
        mean = {name: sum(share * own[name] for share, own in sent) for name in start}
        apart = sum(float((merged[name] - mean[name]).square().sum()) for name in mean)
        moved = sum(float((mean[name] - start[name]).square().sum()) for name in mean)
        found.append((apart / moved) ** 0.5)
    return found


@pytest.mark.parametrize("method", EXACT)
def test_exact_rules_start_from_the_dense_mean(method: str, tiny_root: Path, tmp_path: Path) -> None:
    run, watch = train(tiny_root, tmp_path, method, "loop.rounds=3", "optimizer.lr=0.3", "cohort.number=2")
    for round, error in enumerate(errors(run, watch)):
        merged = weights(run, watch.after[round])
        assert error < 1e-5, round
        assert any(not torch.equal(one, weights(run, watch.before[round])[name]) for name, one in merged.items())
    assert max(row["lora/aggregation_error"] for row in run.loop.history) < 1e-5


@pytest.mark.parametrize(
    ("method", "settings"),
    [("fedit", []), ("flexlora", ["model.adapters.rank=1"]), ("hetlora", ["callbacks.ranks.ranks=null"])],
)
def test_the_error_of_the_others_is_the_one_that_is_logged(
    method: str, settings: list[str], tiny_root: Path, tmp_path: Path
) -> None:
    run, watch = train(tiny_root, tmp_path, method, "optimizer.lr=0.3", *settings)
    expected = errors(run, watch)
    assert min(expected) > 1e-3
    assert [row["lora/aggregation_error"] for row in run.loop.history] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["fedit", "flexlora", "hetlora", "flora"])
def test_of_one_client_nothing_is_lost(method: str, tiny_root: Path, tmp_path: Path) -> None:
    ranks = ["callbacks.ranks.ranks=null"] if method == "hetlora" else []
    run, _ = train(tiny_root, tmp_path, method, "cohort.number=1", "model.adapters.rank=2", "loop.rounds=1", *ranks)
    assert run.loop.history[0]["lora/aggregation_error"] < 1e-6


def test_stacked_adapters_of_unlike_ranks_are_merged_exactly(tiny_root: Path, tmp_path: Path) -> None:
    words = ["callbacks.ranks.ranks=[1,2,4]", "optimizer.lr=0.3"]
    run, watch = train(tiny_root, tmp_path, "flora", *words)
    assert max(errors(run, watch)) < 1e-5
    for updates in watch.updates:
        for rank, (_, state) in zip([1, 2, 4], updates, strict=True):
            for layer in adapted_layers(run.module):
                a, b = state[layer.a], state[layer.b].flatten(1)
                assert int(torch.linalg.matrix_rank(b @ a.flatten(1))) == rank
                assert not a[rank:].any()
                assert not b[:, rank:].any()


def test_means_with_the_products_norms_as_weights(tiny_root: Path, tmp_path: Path) -> None:
    words = ["callbacks.ranks.ranks=[1,3]", "callbacks.ranks.prune=null", "loop.rounds=1"]
    run, watch = train(tiny_root, tmp_path, "hetlora", *words)
    layers = adapted_layers(run.module)
    products = [[layer.product(state) for layer in layers] for _, state in watch.updates[0]]
    norms = [sum(float(one.square().sum()) for one in own) ** 0.5 for own in products]
    for layer in layers:
        for name in (layer.a, layer.b):
            terms = [norm * state[name] for norm, (_, state) in zip(norms, watch.updates[0], strict=True)]
            torch.testing.assert_close(watch.after[0][name], sum(terms) / sum(norms))


def test_a_client_prunes_its_rank(tiny_root: Path, tmp_path: Path) -> None:
    words = ["callbacks.ranks.ranks=[4]", "callbacks.ranks.prune=5", "callbacks.ranks.keep=0.5", "loop.rounds=4"]
    run, watch = train(tiny_root, tmp_path, "hetlora", *words, "optimizer.lr=0.05")
    ranks = run.loop.callbacks["ranks"].pruned  # type: ignore[attr-defined]
    assert ranks
    assert set(ranks.values()) <= {1, 2}
    assert run.loop.history[-1]["lora/mean_rank"] < 4
    layer = adapted_layers(run.module)[0]
    assert {state[layer.a].shape[0] for state in watch.down[-1]} != {4}


def test_bytes_are_those_of_the_adapters(tiny_root: Path, tmp_path: Path) -> None:
    def bytes_of(method: str, *words: str) -> tuple[Federation, list[int], list[int]]:
        run, _ = train(tiny_root, tmp_path / method, method, "model.adapters.rank=1", *words)
        rows = run.loop.history
        return run, *([int(row[f"traffic/bytes_{way}"]) for row in rows] for way in ("up", "down"))

    run, up, down = bytes_of("fedit")
    layers, own = adapted_layers(run.module), run.module.state_dict()
    a, b = (3 * num_bytes({name: own[name] for name in names}) for names in zip(*((x.a, x.b) for x in layers)))  # noqa: B905
    rest = 3 * num_bytes({name: own[name] for name in run.loop.state if "lora_" not in name})
    assert (up, down) == ([a + b + rest] * 2, [a + b + rest] * 2)
    assert bytes_of("ffa_lora")[1:] == ([b + rest] * 2, [b + rest] * 2)
    assert bytes_of("fedsa_lora")[1:] == ([a + rest] * 2, [a + rest] * 2)
    assert bytes_of("rolora")[1:] == ([b + rest, a + rest], [a + b + rest, b + rest])
    # Three clients' adapters go down to each, and nothing of the new ones.
    assert bytes_of("flora")[1:] == ([a + b + rest] * 2, [a + b + rest, 3 * (a + b) + rest])
    assert bytes_of("fedex_lora")[1:] == ([a + b + rest] * 2, [a + b + rest, 4 * (a + b) + rest])


def test_a_client_that_was_away_gets_what_it_missed(tiny_root: Path, tmp_path: Path) -> None:
    run, watch = train(tiny_root, tmp_path, "flora", "model.adapters.rank=1", "cohort.number=1", "loop.rounds=5")
    sent = [[{key.split("/")[0] for key in one if "/" in key} for one in down] for down in watch.down]
    seen: dict[int, int] = {}
    for round, row in enumerate(sent):
        [client] = [one.id for one in run.loop.cohort.draw(run.loop.clients, round, run.loop.seed)]
        missed = round - seen.get(client, 0)
        assert len(row[0]) == (missed if missed <= 3 else 0)  # the factors of four rounds are larger than the weights
        seen[client] = round
    aggregator: Any = run.loop.aggregator
    aggregator.factors = []
    dense = aggregator.missed(run.loop.state, 0)
    assert num_bytes(dense) == aggregator.dense_bytes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=fedit", "model.adapters=null"], "model.adapters must be given for this method"),
        (["callbacks.ranks.ranks=[5]"], "callbacks.ranks.ranks must be at most model.adapters.rank=4, got 5"),
        (["callbacks.ranks.ranks=[0]"], "callbacks.ranks.ranks must be null, or list ranks of at least 1"),
        (["model.adapters=null"], "sharing.merged needs a model with frozen weights"),
        (["method=fedit", "+model.adapters.dora=true"], "model.adapters.dora must be false for this method"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], message: str, tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_root, tmp_path, "flora", *words)


@pytest.mark.parametrize("method", ["fedsa_lora", "feddpa", "hetlora"])
def test_peft_reads_each_clients_own_adapters(method: str, tiny_root: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
    words = [f"method={method}", *VIT, "loop.rounds=2", "optimizer.lr=0.3"]
    run = federation(tiny_root, tmp_path, *words)
    base = {name: tensor.clone() for name, tensor in run.module.state_dict().items() if "lora_" not in name}
    plain = export_state_dict({n.replace(".base_layer.", "."): t for n, t in base.items()}, run.module.head_path)
    x, outputs, module = torch.rand(4, 3, 8, 8), [], run.module
    with run.open():
        run.loop.run_rounds()
        finish(run.loop, RunFolder(tmp_path), config(tiny_root, *words), run.partition_hash)
        for client in run.loop.clients:
            state = run.loop.global_state() if method == "hetlora" else run.loop.personal_state(client)
            if method == "hetlora":
                run.loop.callbacks["evaluation"].restore(run.loop, "global")
                state = dict(run.loop.global_state())
                rank = run.loop.callbacks["ranks"].rank(client.id)
                for layer in adapted_layers(module):
                    state[layer.a] = state[layer.a].clone()
                    state[layer.a][rank:] = 0
            module.load_state_dict(state)
            module.eval()
            with module._shares(0.0, 1.0) if method == "feddpa" else nullcontext():
                outputs.append(module(x))
    for client, expected in zip(run.loop.clients, outputs, strict=True):
        model = VisionTransformer(**sizes, num_classes=3)
        model.load_state_dict(plain)
        folder = tmp_path / f"adapters/client_{client.id}"
        read = peft.PeftModel.from_pretrained(model, str(folder)).eval()
        torch.testing.assert_close(read(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1])
