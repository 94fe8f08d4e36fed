"""Whatever cannot be composed is said in one sentence, with the close names."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fl_lightning.run.config import CONF, TrainConfig, plain
from fl_lightning.run.overrides import explain

CASES = [
    ("train", ["optimizer.lrr=1"], "there is no optimizer.lrr; did you mean optimizer.lr?"),
    ("train", ["optimiser=adam"], "there is no optimiser; did you mean optimizer?"),
    ("train", ["method=fedproxx"], "there is no method=fedproxx; did you mean method=fedprox or "),
    ("train", ["model=timm", "model.nam=x"], "there is no model.nam; did you mean model.name?"),
    ("train", ["model.name=x"], "there is no model.name with these choices; another option, of model perhaps"),
    ("train", ["method=fedprox", "callbacks.proximal.muu=1"], "did you mean callbacks.proximal.mu"),
    ("train", ["callbacks.proximal.muu=1"], "callbacks.proximal.mu"),
    ("train", ["optimizer.nesterov=true"], "+optimizer.nesterov=... adds one"),
    ("train", ["seed=abc"], "seed: Value 'abc' of type 'str' could not be converted to Integer"),
    ("train", ["data=cifar10", "data.partitioner.clients=100"], "data.num_clients"),
    ("train", ["model=resnet50"], "model=timm model.name=resnet50?"),
    ("train", ["@x=1"], "'@x=1' is not of the form key=value"),
    ("train", ["loop.rounds"], "'loop.rounds' is not of the form key=value"),
    ("train", ["optimizer.lr=0.1,0.2"], "add --multirun"),
    (
        "train",
        ["data=cifar10", "data/partitioner=iidd"],
        "no data/partitioner=iidd; did you mean data/partitioner=iid?",
    ),
    ("train", ["data=nothing"], "there is no data=nothing; these are: celeba, "),
    ("train", ["model=null"], "there is no model=null; these are: cnn2, gpt2, gpt_tiny, "),
    ("train", ["seed=3", "executor=null"], "there is no executor=null; these are: cohort, hosted, processes, "),
    ("train", ["optimizer=null"], "there is no optimizer=null; these are: adam, adamw, sgd"),
    ("train", ["trainer=null"], "there is no trainer=null; these are: cpu, gpu"),
    ("train", ["optimizer=3"], "there is no optimizer=3; these are: adam, adamw, sgd"),
    ("train", ["+executor=null"], "there is no executor=null; these are: cohort"),
    ("personalize", ["personalization=null"], "there is no personalization=null; these are: "),
    ("personalize", ["personalization=[ftt]"], "there is no personalization=ftt; did you mean personalization=ft?"),
    ("personalize", ["baselines=[none]"], "write 'personalization@baselines=[none]'"),
    ("personalize", ["lp_epoch=3"], "there is no lp_epoch; did you mean lp_epochs?"),
    ("personalize", ["method=fedavg"], "there is no method with these choices"),
]


@pytest.mark.parametrize(("name", "arguments", "sentence"), CASES, ids=[" ".join(case[1]) for case in CASES])
def test_a_sentence_with_the_close_names(name: str, arguments: list[str], sentence: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Exception) as caught:  # noqa: PT011
        compose(name, arguments)
    words = explain(caught.value, name, arguments)
    assert sentence in words
    assert "\n" not in words


def test_a_root_key_that_was_added_is_refused() -> None:
    cfg = OmegaConf.structured(TrainConfig)
    OmegaConf.update(cfg, "sede", 3, force_add=True)
    with pytest.raises(ValueError, match="sede is no key of the configuration; did you mean seed"):
        plain(cfg)
