"""A killed run goes on to the same bits; files that cannot be gone on from are refused by name."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fl_lightning import files
from fl_lightning.callbacks.checkpoint import Checkpoint, read_checkpoint
from fl_lightning.callbacks.persistent_optimizer import PersistentOptimizer
from fl_lightning.files import read_tensors
from fl_lightning.run.folder import RunFolder
from tests.federations import assert_same, federation, outcome
from tests.stress_kill import run_child, stress


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["method=scaffold", "cohort.number=2"], marks=pytest.mark.slow),
        ["method=fedbn", "checkpoint.every=2"],
    ],
)
def test_kill_9_and_resume_gives_equal_bits(overrides: list[str], tiny_root: Path, tmp_path: Path) -> None:
    hits = stress(tiny_root, tmp_path, [*overrides, "loop.rounds=8"], kills=4)
    assert hits > 0, "no kill hit the running child: nothing was tested"


@pytest.fixture(scope="module")
def made(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round."""
    folder = tmp_path_factory.mktemp("made") / "run"
    federation(tiny_root, folder, "loop.rounds=1").fit()
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of a run of one round."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def test_another_configuration_is_refused_and_named(tiny_root: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer.lr was 0.05, now 0.5"):
        federation(tiny_root, folder, "loop.rounds=1", "optimizer.lr=0.5", f"resume='{folder}'")


def test_more_rounds_may_follow(tiny_root: Path, folder: Path) -> None:
    run = federation(tiny_root, folder, "loop.rounds=3", f"resume='{folder}'")
    run.fit()
    assert [row["round"] for row in run.loop.history] == [0, 1, 2]


def test_a_run_is_never_overwritten(tiny_root: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run.*resume="):
        federation(tiny_root, folder, "loop.rounds=1")


def test_another_partition_is_refused(tiny_root: Path, folder: Path) -> None:
    text = (folder / "partition.json").read_text()
    (folder / "partition.json").write_text(text.replace('"ann"', '"eve"'))
    with pytest.raises(ValueError, match="partition"):
        federation(tiny_root, folder, "loop.rounds=1", f"resume='{folder}'")


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "pickle", "foreign"])
def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    path = Checkpoint(tmp_path).last
    save(path, {"round": 1})
    assert read_checkpoint(path) == {"round": 1, "executor": {"clients": {}}}
    whole = path.read_bytes()
    content = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "garbage": b"\x00\x01garbage" * 100,
        "pickle": pickle.dumps(Path("x")),
    }
    if damage == "foreign":
        torch.save({"weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(content[damage])
    with pytest.raises(ValueError, match="last.pt"):
        read_checkpoint(path)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "owned",))

    path = tmp_path / "model.pt"
    torch.save({"x": Evil()}, path)
    with pytest.raises(ValueError, match="model.pt"):
        read_tensors(path)
    assert not (tmp_path / "owned").exists()


def test_fewer_rounds_than_were_done_are_refused(tiny_root: Path, tmp_path: Path) -> None:
    federation(tiny_root, tmp_path, "loop.rounds=2").fit()
    with pytest.raises(ValueError, match="has done 2 rounds already, more than loop.rounds=1"):
        federation(tiny_root, tmp_path, f"resume='{tmp_path}'", "loop.rounds=1")


def save(path: Path, content: dict[str, Any], run: dict[str, str] | None = None) -> None:
    loop = SimpleNamespace(round=1, rounds=1, should_stop=False, state_dict=lambda: {**content, "executor": {}})
    Checkpoint(path.parent, run=run).on_round_logged(loop, {})  # type: ignore[arg-type]


def client_loop(clients: dict[int, Any], number: int = 1) -> Any:
    content = {"round": number, "executor": {"clients": clients}}
    return SimpleNamespace(round=number, rounds=9, should_stop=False, state_dict=lambda: content)


def held(personal: float, **memory: Any) -> dict[str, Any]:
    state = {"w": torch.full((3,), personal)}
    return {"personal": state, "memory": memory, "kept": {"personal": dict(state)}}


def test_only_the_states_that_changed_are_written_and_stale_ones_go(tmp_path: Path) -> None:
    clients = {0: held(0.0), 1: held(1.0, steps=3), 2: {"personal": {}, "memory": {"c": torch.ones(2)}, "kept": {}}}
    checkpoint, folder = Checkpoint(tmp_path), tmp_path / "clients"

    def write(number: int) -> tuple[set[str], set[str]]:
        """Return the files that came and those that went."""
        before = set(os.listdir(folder)) if folder.is_dir() else set()
        checkpoint.on_round_logged(client_loop(clients, number), {})
        assert_same(read_checkpoint(checkpoint.last)["executor"]["clients"], clients)
        after = set(os.listdir(folder))
        return after - before, before - after

    first, _ = write(1)
    assert sorted(name[0] for name in first) == ["0", "1", "1", "2"], "what is put aside as it is takes no file more"
    assert write(2) == (set(), set())
    clients[1] = {**clients[1], "personal": {"w": torch.full((3,), 5.0)}}
    came, went = write(3)
    assert ([name[0] for name in came], went) == (["1"], set()), "the old state is still put aside"
    clients[1]["kept"] = {}
    assert [name[0] for name in write(4)[1]] == ["1"]
    clients[2]["memory"]["c"].add_(1)
    assert [[name[0] for name in names] for names in write(5)] == [["2"], ["2"]], "written to in place"
    (folder / "7_of_a_killed_run.pt").touch()
    checkpoint = Checkpoint(tmp_path)
    assert write(6) == (set(), {"7_of_a_killed_run.pt"})


def test_checkpoints_that_are_kept_keep_their_states(tmp_path: Path) -> None:
    for number in (1, 2):
        Checkpoint(tmp_path, keep=True).on_round_logged(client_loop({0: held(float(number))}, number), {})
    Checkpoint(tmp_path).on_round_logged(client_loop({0: held(3.0)}, 3), {})
    for number in (1, 2):
        state = read_checkpoint(tmp_path / f"round_{number:05d}.pt")["executor"]["clients"][0]["personal"]
        assert torch.equal(state["w"], torch.full((3,), float(number)))


def test_a_damaged_or_missing_state_of_a_client_is_refused_by_name(tmp_path: Path) -> None:
    Checkpoint(tmp_path).on_round_logged(client_loop({4: held(1.0)}), {})
    [path] = (tmp_path / "clients").iterdir()
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"clients/4_\w+.pt is damaged"):
        read_checkpoint(tmp_path / "last.pt")
    path.unlink()
    with pytest.raises(ValueError, match=r"last.pt needs clients/4_\w+.pt, which is not there"):
        read_checkpoint(tmp_path / "last.pt")


@pytest.mark.slow
def test_killed_at_every_step_to_the_disk_and_resumed(tiny_root: Path, tmp_path: Path) -> None:
    words = ["method=fedbn", "cohort.number=2", "loop.rounds=3"]
    assert os.waitstatus_to_exitcode(os.waitpid(run_child(tiny_root, tmp_path / "whole", words), 0)[1]) == 0
    clean = 0
    for place in range(1, 1000):
        folder = tmp_path / str(place)
        code = os.waitstatus_to_exitcode(os.waitpid(run_child(tiny_root, folder, words, place), 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert os.waitstatus_to_exitcode(os.waitpid(run_child(tiny_root, folder, words), 0)[1]) == 0
        assert_same(outcome(folder), outcome(tmp_path / "whole"))
        left, expected = (set(os.listdir(one / "checkpoints" / "clients")) for one in (folder, tmp_path / "whole"))
        assert expected <= left, "killed in the very end, it leaves stale files behind"
        clean += left == expected
    assert place > 30
    assert clean > place - 10


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"lacks {key}": lambda content, key=key: content.pop(key) for key in ("round", "state", "callbacks", "history")},
    "lacks a tensor": lambda content: content["state"].pop("head.weight"),
    "integer weights": lambda content: content["state"].update({"head.weight": torch.zeros(3, 8, dtype=torch.int64)}),
    "negative round": lambda content: content.update(round=-5),
    "half a round": lambda content: content.update(round=2.5),
    "round in words": lambda content: content.update(round="two"),
    "broken history": lambda content: content.update(history=[3]),
    "another run": lambda content: content.update(run={}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_checkpoint_that_was_changed_is_refused_by_name(edit: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    state = {"head.weight": torch.zeros(3, 8)}
    save(path, {"round": 1, "state": state, "callbacks": {}, "history": [{"round": 0.0}]}, {"configuration": "a"})
    read_checkpoint(path)
    content = torch.load(path, weights_only=True)
    EDITS[edit](content)
    torch.save(content, path)
    with pytest.raises(ValueError, match="last.pt is damaged"):
        read_checkpoint(path)


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.manual_seed(0)
    save(path, {"state": {"w": torch.randn(50)}, "history": [{"loss": 0.5}], "round": 3})
    whole, content = path.read_bytes(), files.fingerprint(read_checkpoint(path))
    refused = []
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            assert files.fingerprint(read_checkpoint(path)) == content, f"bit {place % 8} of byte {place}"
        except ValueError as problem:
            refused.append(str(problem))
    assert len(refused) > 30
    assert all("last.pt" in sentence for sentence in refused)


def test_a_checkpoint_of_another_version_or_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"format": "fl_lightning federation 1", "round": 1}, path)
    with pytest.raises(ValueError, match="last.pt is of another version of fl_lightning, whose structure is older"):
        read_checkpoint(path)
    save(path, {"round": 1}, {"configuration": "a", "partition": "b"})
    assert read_checkpoint(path, {"configuration": "a"})["round"] == 1
    with pytest.raises(ValueError, match="last.pt belongs to another run: its partition"):
        read_checkpoint(path, {"configuration": "a", "partition": "c"})


def test_a_checkpoint_of_another_seed_is_refused(tiny_root: Path, tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other"
    federation(tiny_root, other, "loop.rounds=1", "seed=2").fit()
    shutil.copy(other / "checkpoints" / "last.pt", folder / "checkpoints" / "last.pt")
    with pytest.raises(ValueError, match="last.pt belongs to another run: its configuration"):
        federation(tiny_root, folder, "loop.rounds=1", f"resume='{folder}'")


def test_what_is_saved_is_what_was_read(tiny_root: Path, tmp_path: Path) -> None:
    # If the keys change, so does checkpoint.VERSION.
    words = [
        "method=scaffold",
        f"+callbacks.optimizer={{_target_: {PersistentOptimizer.__module__}.PersistentOptimizer}}",
    ]
    folder = tmp_path / "run"
    federation(tiny_root, folder, "loop.rounds=1", *words).fit()
    saved = read_checkpoint(folder / "checkpoints" / "last.pt")
    run = federation(tiny_root, folder, "loop.rounds=1", *words, f"resume='{folder}'")
    run.fit()
    assert files.fingerprint(run.loop.state_dict()) == files.fingerprint(saved)


@pytest.mark.parametrize("damage", [b"", b"seed: 1\nmodel:\n  na", b"\x80\x00\xff", b"- 1\n", b"seed: ${nothing}\n"])
def test_a_damaged_configuration_is_named(damage: bytes, tiny_root: Path, folder: Path) -> None:
    (folder / "config.yaml").write_bytes(damage)
    with pytest.raises(ValueError, match="config.yaml is damaged"):
        federation(tiny_root, folder, "loop.rounds=1", f"resume='{folder}'")


def test_half_a_configuration_is_not_taken_for_an_old_one(tiny_root: Path, folder: Path) -> None:
    content = OmegaConf.load(folder / "config.yaml")
    del content["local"]["validate"]
    OmegaConf.save(content, folder / "config.yaml")
    with pytest.raises(ValueError, match="last.pt belongs to another run: its configuration"):
        federation(tiny_root, folder, "loop.rounds=1", f"resume='{folder}'")


def test_a_key_that_came_later_counts_as_its_default(
    tiny_root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(folder)
    config = run.read_config()
    now = {**config, "newer": 3, "local": {**config["local"], "newer": 4}}
    assert run.changed_config(now) == []
    assert "does not know local.newer, newer yet; the default of now counts" in caplog.text
    added = {**config, "callbacks": {"extra": {"_target_": "x"}}}
    assert run.changed_config(added) == ["callbacks.extra was None, now {'_target_': 'x'}"]


def test_a_run_of_too_old_a_version_is_refused(tiny_root: Path, folder: Path) -> None:
    (noted,) = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps([{**noted, "fl_lightning": "0.1.0"}]))
    with pytest.raises(ValueError, match=r"was made by fl_lightning 0.1.0; runs are read from 0\.2\.0 on"):
        RunFolder(folder).read_config()


@pytest.mark.parametrize("damage", [b"", b"[{", b"\x80\x00", b"3"])
def test_damaged_notes_of_the_environment_are_begun_anew(
    damage: bytes, tiny_root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "environment.json").write_bytes(damage)
    federation(tiny_root, folder, "loop.rounds=1", f"resume='{folder}'")
    assert "environment.json is damaged" in caplog.text
    assert len(json.loads((folder / "environment.json").read_text())) == 1


def forked(work: Callable[[], object]) -> int:
    """Run something in a process of its own and return its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except ValueError as error:
        os._exit(7 if "another process is running in" in str(error) else 1)
    os._exit(0)


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    held = RunFolder(tmp_path)
    held.hold()
    child = forked(RunFolder(tmp_path).hold)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_second_process_may_wait(tmp_path: Path) -> None:
    held = RunFolder(tmp_path)
    held.hold()

    def wait() -> None:
        RunFolder(tmp_path).hold(wait=True)
        (tmp_path / "second").touch()

    child = forked(wait)
    time.sleep(0.3)
    assert not (tmp_path / "second").exists()
    assert held._lock is not None
    held._lock.close()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "second").exists()


def test_other_threads_are_said_to_change_last_bits(
    tiny_root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federation(tiny_root, folder, "loop.rounds=1", f"resume='{folder}'", "executor.threads=2")
    assert "last bits may differ" in caplog.text


@pytest.mark.parametrize("logger", [pytest.param("csv", marks=pytest.mark.every), "tensorboard"])
def test_curves_of_a_resumed_run_are_whole_and_go_over_no_round_twice(
    logger: str, tiny_root: Path, tmp_path: Path
) -> None:
    words = [f"logger={logger}", "dashboard=null", "progress=null", "checkpoint.every=5"]
    run = federation(tiny_root, tmp_path, "loop.rounds=2", *words)
    with run.open():  # dies before its first checkpoint
        run.loop.rounds = 1
        (tmp_path / "checkpoints").mkdir()
        run.loop.callbacks.pop("checkpoint")
        run.loop.run_rounds()
    for rounds in (1, 2):  # without a checkpoint, then with one
        run = federation(tiny_root, tmp_path, f"loop.rounds={rounds}", *words, f"resume='{tmp_path}'")
        run.fit()
        assert run.loop.logger is not None
        run.loop.logger.finalize("success")
    assert rounds_logged(logger, tmp_path) == [0, 1]


def rounds_logged(logger: str, folder: Path) -> list[int]:
    if logger == "csv":
        (file,) = (folder / "csv").rglob("metrics.csv")
        lines = list(csv.DictReader(file.open()))
        return [int(line["step"]) for line in lines if line["test/global/accuracy/mean"]]
    events = EventAccumulator(str(folder))
    events.Reload()
    return [point.step for point in events.Scalars("test/global/accuracy/mean")]
