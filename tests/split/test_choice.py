"""Model and client profiles, cut policies and the latency model, against numbers worked out by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from fl_lightning.models import lenet5
from fl_lightning.run.config import instantiate, plain
from fl_lightning.run.overrides import composed
from fl_lightning.run.training import new_module
from fl_lightning.split.blocks import chain
from fl_lightning.split.cost import (
    BatchSeconds,
    BlockProfile,
    ClientProfile,
    LatencyModel,
    ModelProfile,
    asynchronous_seconds,
    batch_bytes,
    optimizer_slots,
    profile_model,
    sequential_seconds,
    with_weights,
)
from fl_lightning.split.cut import Cut
from fl_lightning.split.policy import BudgetCuts, CheapestCuts, FixedCuts
from fl_lightning.split.traffic import Traffic

# Four blocks of 10, 20, 30 and 40 FLOPs whose outputs take 8, 4, 2 and 1 bytes, and a head of 5 FLOPs.
MODEL = ModelProfile(
    tuple(BlockProfile(f"b{i}", 10 * (i + 1), 8 >> i, saved_bytes=100, param_bytes=1000 * (i + 1)) for i in range(4)),
    BlockProfile("head", 5, 1, saved_bytes=0, param_bytes=500),
)


def test_profile_of_lenet_is_what_the_formulas_say() -> None:
    model = lenet5(num_classes=10)
    profile = profile_model(chain(model.backbone), model.head, torch.zeros(1, 3, 32, 32))
    flops = [2 * 28 * 28 * 6 * 3 * 25, 2 * 10 * 10 * 16 * 6 * 25, 2 * 400 * 120, 2 * 120 * 84]
    assert [block.flops for block in profile.blocks] == flops
    assert profile.head.flops == 2 * 84 * 10
    assert [block.out_bytes for block in profile.blocks] == [4 * n for n in (6 * 14 * 14, 16 * 5 * 5, 120, 84)]
    assert sum(block.param_bytes for block in profile.blocks) + profile.head.param_bytes == 4 * 62_006
    assert all(block.saved_bytes >= block.out_bytes for block in profile.blocks)


def test_attention_is_counted() -> None:
    attention = nn.MultiheadAttention(8, 1, batch_first=True, bias=False)

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    profile = profile_model({"attention": SelfAttention()}, nn.Identity(), torch.zeros(1, 5, 8))
    projections, scores_and_values = 4 * 2 * 5 * 8 * 8, 2 * 2 * 5 * 5 * 8
    assert profile.blocks[0].flops == projections + scores_and_values


def test_profiling_leaves_modes_and_statistics_alone() -> None:
    block = nn.BatchNorm1d(3).train()
    profile_model({"norm": block}, nn.Linear(3, 2), torch.randn(1, 3))
    assert block.training
    assert block.num_batches_tracked == 0


def test_latency_by_hand() -> None:
    client = ClientProfile(flops_per_second=10, memory=1e9, up=2, down=4)
    latency = LatencyModel(MODEL, batch_size=2, server_flops_per_second=100)
    batch = latency.batch(Cut(1, 2, 3), client)
    # front 30 FLOPs, tail 40 + 5, body 30, at twice: a batch of two; 4 bytes cross the cut and 2 the end, per example
    assert batch.front == 60 / 10 + 8 / 2
    assert batch.body_forward == 60 / 100
    assert batch.tail == 4 / 4 + 3 * 90 / 10 + 4 / 2
    assert batch.body_backward == 120 / 100
    assert batch.front_backward == 8 / 4 + 2 * 60 / 10
    assert batch.total == pytest.approx(3 * (60 + 90) / 10 + 3 * 60 / 100 + (8 + 4) / 2 + (8 + 4) / 4)
    aligned = LatencyModel(MODEL, 2, 100, align_at="server").batch(Cut(1, 2, 3), client)
    assert aligned.total - batch.total == pytest.approx(16 / 2 + 40 / 100)  # the base goes up, its copy is computed
    assert batch_bytes(Cut(1, 2, 3), MODEL, 2, "client").down == 8 + 4 + 8


def test_waiting_for_the_server() -> None:
    batch = BatchSeconds(front=1, body_forward=4, tail=1, body_backward=2, front_backward=1)
    assert sequential_seconds([[batch, batch], [batch]]) == 3 * 9
    assert asynchronous_seconds([[batch, batch]]) == 2 * 9
    # Both arrive at 1; the first is served until 5, the second until 9. The first's gradient comes at 6 and waits until
    # 9, is served until 11 and ends at 12; the second's comes at 10, waits until 11, is served until 13, ends at 14.
    assert asynchronous_seconds([[batch], [batch]]) == 14
    free = BatchSeconds(front=1, body_forward=0, tail=2, body_backward=0, front_backward=3)
    assert asynchronous_seconds([[free], [free, free], []]) == 12
    assert asynchronous_seconds([]) == 0


def test_frozen_parts_send_no_gradient_and_compute_none() -> None:
    client, cut = ClientProfile(flops_per_second=10, memory=1e9, up=2, down=4), Cut(1, 2, 3)
    latency = LatencyModel(MODEL, batch_size=2, server_flops_per_second=100)
    batch = latency.batch(cut, client, reach="body")
    assert (batch.body_backward, batch.front_backward) == (120 / 100, 0)
    assert batch_bytes(cut, MODEL, 2, None, "body") == Traffic(8, 4, 4, 0)
    batch = latency.batch(cut, client, reach="tail")
    assert (batch.front, batch.body_forward) == (60 / 10 + 8 / 2, 60 / 100)
    assert (batch.tail, batch.body_backward, batch.front_backward) == (4 / 4 + 3 * 90 / 10, 0, 0)
    assert batch_bytes(cut, MODEL, 2, None, "tail") == Traffic(8, 4, 0, 0)


def test_weights_come_before_a_fit_and_go_after_it_without_waiting_for_the_server() -> None:
    batch = BatchSeconds(front=1, body_forward=4, tail=1, body_backward=2, front_backward=1)
    one, other = with_weights([batch], down=1, up=5), with_weights([batch, batch], down=0, up=2)
    assert sequential_seconds([one]) == 9 + 6
    # One is at the server at 2, other at 1 and served until 5, one then until 9. The other's gradient comes at 6, is
    # served from 9 to 11; one's comes at 10, is served from 11 to 13, ends at 14 and its weights go until 19. The other
    # goes on at 12, is at the server at 13 until 17, again from 18 to 20, and ends at 21 + 2.
    assert asynchronous_seconds([one]) == 15
    assert asynchronous_seconds([one, other]) == 23
    assert asynchronous_seconds([one, other[:1]]) == 19


def test_fixed_cuts() -> None:
    latency = LatencyModel(MODEL, 1)
    client = ClientProfile()
    assert [FixedCuts([1, 2]).choose(i, client, latency, 1, 3).at for i in range(3)] == [1, 2, 1]
    assert [FixedCuts().choose(i, client, latency, 1, 4).at for i in range(4)] == [1, 2, 3, 1]
    with pytest.raises(ValueError, match="1 <= start <= cut < end <= 4, .* got start 1, cut 3, end 3"):
        FixedCuts([3]).choose(0, client, latency, 1, 3)
    with pytest.raises(ValueError, match="at least one cut"):
        FixedCuts([])


def test_budget_takes_the_latest_cut_that_fits_memory_and_time() -> None:
    latency = LatencyModel(MODEL, batch_size=2)
    # memory at cut s, end 4: 2 * (sum of parameters + head) + 2 * (activations)
    needs = {at: MODEL.client_memory(at, 4, 2, 0) for at in (1, 2, 3)}
    assert needs[1] == 2 * (1000 + 500) + 2 * (100 + 8 + 1)
    for at in (1, 2, 3):
        exactly = ClientProfile(memory=needs[at])
        assert BudgetCuts().choose(0, exactly, latency, 1, 4).at == at
        less = ClientProfile(memory=needs[at] - 1)
        if at > 1:
            assert BudgetCuts().choose(0, less, latency, 1, 4).at == at - 1
        else:
            with pytest.raises(
                ValueError, match=r"client 7 cannot even hold the cut 1: it would need 3218 of 3217 bytes"
            ):
                BudgetCuts().choose(7, less, latency, 1, 4)
    # a batch of 2 at cut 2 costs 3 * 2 * (10 + 20 + 5) FLOPs
    assert BudgetCuts(seconds=21).choose(0, ClientProfile(flops_per_second=10), latency, 1, 4).at == 2
    assert BudgetCuts(seconds=20.9).choose(0, ClientProfile(flops_per_second=10), latency, 1, 4).at == 1
    # time bends: a client that is too slow for every cut takes the earliest
    assert BudgetCuts(seconds=0.1).choose(0, ClientProfile(flops_per_second=10), latency, 1, 4).at == 1


def test_optimizers_tensors_are_counted_and_take_memory() -> None:
    makers = {torch.optim.SGD: 0, partial(torch.optim.SGD, momentum=0.9): 1, torch.optim.Adam: 2}
    makers[partial(torch.optim.Adam, amsgrad=True)] = 3
    for make, slots in makers.items():
        assert optimizer_slots(partial(make, lr=0.1)) == slots
    needed = MODEL.client_memory(2, 4, 2, 2)
    assert needed - MODEL.client_memory(2, 4, 2, 0) == 2 * (1000 + 2000 + 500)
    adam = LatencyModel(MODEL, batch_size=2, optimizer_slots=2)
    assert BudgetCuts().choose(0, ClientProfile(memory=needed), adam, 1, 4).at == 2
    assert BudgetCuts().choose(0, ClientProfile(memory=needed - 1), adam, 1, 4).at == 1


def test_frozen_weights_take_neither_gradients_nor_optimizer() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    block = profile_model({"layer": layer}, nn.Identity(), torch.zeros(1, 4)).blocks[0]
    assert (block.param_bytes, block.trained_bytes) == (80, 16)
    assert block.memory(1, 2) == 80 + 3 * 16 + block.saved_bytes + block.out_bytes


@pytest.mark.parametrize("name", ["lenet5", "vit_tiny", "gpt_tiny"])
def test_the_five_devices_get_unlike_cuts_by_default(name: str) -> None:
    config = plain(composed("train", ["method=flexp_sfl", f"model={name}"]))
    channels, size, classes = (1, 64, 256) if name == "gpt_tiny" else (3, 32, 10)
    module = new_module(config, classes, channels, size)
    server = instantiate(config["callbacks"]["server"], "callbacks.server")
    x, make = module.example_input(channels, size), instantiate(config["optimizer"], "optimizer")
    latency = server.latency_model(module, x, config["data"]["batch_size"], make)
    assert latency.optimizer_slots == 2
    cuts = [cut.at for cut in server.choose_cuts(module, latency, server.profiles)]
    assert cuts == {"lenet5": [1, 1, 2, 2, 2], "vit_tiny": [1, 1, 2, 6, 6], "gpt_tiny": [1, 1, 1, 2, 4]}[name]


@pytest.mark.parametrize(("policy", "kind"), [("fixed", FixedCuts), ("cheapest", CheapestCuts), ("budget", BudgetCuts)])
def test_a_policy_is_one_word_on_the_command_line(policy: str, kind: type) -> None:
    for method in ("flexp_sfl", "sl"):
        config = plain(composed("train", [f"method={method}", f"split_policy={policy}"]))
        assert isinstance(instantiate(config["callbacks"]["server"], "callbacks.server").policy, kind)


def test_a_machine_measures_itself() -> None:
    device = ClientProfile.measured(torch.device("cpu"))
    assert 1e6 < device.flops_per_second < 1e14
    assert 1e6 < device.memory < 1e13


def test_cheapest_follows_its_weights() -> None:
    latency = LatencyModel(MODEL, batch_size=1, server_flops_per_second=1000)
    slow, fast = ClientProfile(flops_per_second=10), ClientProfile(flops_per_second=1e6)
    assert CheapestCuts(accuracy=1, time=0).choose(0, slow, latency, 1, 4).at == 3
    assert CheapestCuts(accuracy=0, time=1).choose(0, slow, latency, 1, 4).at == 1
    assert CheapestCuts(accuracy=0, time=1).choose(0, fast, latency, 1, 4).at == 3
    for accuracy in (0.0, 5.0, 50.0):
        prices = {at: accuracy * (4 - at) / 3 + latency.batch(Cut(1, at, 4), slow).total for at in (1, 2, 3)}
        chosen = CheapestCuts(accuracy=accuracy, time=1.0).choose(0, slow, latency, 1, 4)
        assert chosen.at == min(prices, key=prices.get)


def test_profiles_are_checked() -> None:
    assert ClientProfile.of({"up": 3}).up == 3
    assert math.isinf(ClientProfile().memory)
    with pytest.raises(ValueError, match="client profile has no speed; it has flops_per_second, memory, up, down"):
        ClientProfile.of({"speed": 1})
    with pytest.raises(ValueError, match="profiles.up must be above 0, got 0"):
        ClientProfile(up=0)
