import json
import logging
import math
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from hydra_rlhf.errors import CheckpointError
from hydra_rlhf.runtime import checkpoint
from hydra_rlhf.runtime.checkpoint import CheckpointStore

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
WRITE_POINTS = (
    "created",
    "model.safetensors",
    "optimizer.safetensors",
    "before_manifest",
    "before_verify",
    "before_rename",
    "renamed",
    "pruning",
)


class Killed(BaseException):
    """Ends a save as a kill would: nothing in the package catches it."""


def kill_at(point: str):
    def failpoint(name: str) -> None:
        if name == point:
            raise Killed(name)

    return failpoint


def content(step: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, object]]:
    """What the checkpoint of `step` holds in these tests."""
    tensors = {
        "model": {"w": torch.full((2, 3), float(step)), "b": torch.tensor([1.5, -0.0], dtype=torch.bfloat16)},
        "optimizer": {"num_steps": torch.tensor(step), "nan": torch.tensor([math.nan])},
    }
    return tensors, {"step": step, "best": [1, 0.1], "note": None}


def save(store: CheckpointStore, *steps: int, protect: tuple[int, ...] = ()) -> CheckpointStore:
    for step in steps:
        store.save(step, *content(step), protect=protect)
    return store


def assert_holds(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None
    tensors, state = content(step)
    assert (found.step, found.state) == (step, state)
    assert found.tensors.keys() == tensors.keys()
    for name, entries in tensors.items():
        assert found.tensors[name].keys() == entries.keys()
        for key, tensor in entries.items():
            loaded = found.tensors[name][key]
            assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
            assert loaded.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_what_is_saved_is_loaded_bit_for_bit_and_nothing_else_is_left(tmp_path):
    store = save(CheckpointStore(tmp_path / "ppo", keep=2), 100)
    assert_holds(store.load(100), 100)
    assert_holds(store.latest_valid(), 100)
    assert sorted(os.listdir(tmp_path / "ppo")) == ["step-000100"]
    assert tuple(sorted(os.listdir(tmp_path / "ppo/step-000100"))) == FILES
    manifest = json.loads((tmp_path / "ppo/step-000100/manifest.json").read_text())
    assert (manifest["schema"], manifest["step"], sorted(manifest["files"])) == (1, 100, list(FILES[1:]))
    assert manifest["files"]["state.json"]["bytes"] == (tmp_path / "ppo/step-000100/state.json").stat().st_size


def test_equal_content_makes_equal_files(tmp_path):
    one, other = (save(CheckpointStore(tmp_path / name, keep=1), 7).folder / "step-000007" for name in "ab")
    assert [(one / name).read_bytes() for name in FILES] == [(other / name).read_bytes() for name in FILES]


def test_no_checkpoint_is_not_an_error_but_a_missing_one_is(tmp_path):
    store = CheckpointStore(tmp_path / "ppo", keep=2)
    assert store.latest_valid() is None
    assert store.steps() == []
    save(store, 5)
    with pytest.raises(CheckpointError, match=r"step-000006 does not exist.*\[5\]"):
        store.load(6)


def test_the_newest_and_the_protected_ones_are_kept(tmp_path):
    store = save(CheckpointStore(tmp_path / "ppo", keep=2), 1, 2, 3, 4, protect=(1,))
    assert store.steps() == [1, 3, 4]
    save(store, 5, protect=(4,))
    assert store.steps() == [4, 5]
    save(store, 1_000_000)
    assert store.steps() == [5, 1_000_000]


@pytest.mark.parametrize("point", WRITE_POINTS)
def test_a_kill_at_any_write_point_leaves_a_whole_checkpoint_and_the_next_save_cleans_up(tmp_path, point):
    save(CheckpointStore(tmp_path / "ppo", keep=1), 10)
    with pytest.raises(Killed):
        save(CheckpointStore(tmp_path / "ppo", keep=1, failpoint=kill_at(point)), 20)
    reopened = CheckpointStore(tmp_path / "ppo", keep=1)
    assert_holds(reopened.latest_valid(), 20 if point in ("renamed", "pruning") else 10)
    save(reopened, 30)
    assert os.listdir(tmp_path / "ppo") == ["step-000030"]
    assert_holds(reopened.latest_valid(), 30)


@pytest.mark.parametrize("point", [*WRITE_POINTS[:-1], "aside"])
def test_a_kill_while_a_step_is_replaced_leaves_one_of_the_two_whole(tmp_path, point):
    save(CheckpointStore(tmp_path / "ppo", keep=1), 10)
    replaced = content(10)[0], {"second": True}
    with pytest.raises(Killed):
        CheckpointStore(tmp_path / "ppo", keep=1, failpoint=kill_at(point)).save(10, *replaced)
    reopened = CheckpointStore(tmp_path / "ppo", keep=1)
    reopened.recover()
    assert os.listdir(tmp_path / "ppo") == ["step-000010"]
    found = reopened.latest_valid()
    assert found is not None
    assert found.state == ({"second": True} if point == "renamed" else content(10)[1])


def test_a_replayed_step_replaces_the_old_one(tmp_path):
    store = save(CheckpointStore(tmp_path / "ppo", keep=2), 10)
    store.save(10, content(10)[0], {"second": True})
    assert store.load(10).state == {"second": True}
    assert os.listdir(tmp_path / "ppo") == ["step-000010"]


def test_a_failed_save_leaves_nothing_and_the_previous_checkpoint_whole(tmp_path):
    def no_space(name: str) -> None:
        if name == "before_manifest":
            raise OSError(28, "No space left on device")

    save(CheckpointStore(tmp_path / "ppo", keep=1), 10)
    store = CheckpointStore(tmp_path / "ppo", keep=1, failpoint=no_space)
    with pytest.raises(CheckpointError, match=r"cannot write .*ppo: No space left on device"):
        save(store, 20)
    assert os.listdir(tmp_path / "ppo") == ["step-000010"]
    assert_holds(store.latest_valid(), 10)


@pytest.mark.parametrize("room", [0, 1, 100, 200, 300])
def test_a_full_disk_at_any_byte_is_a_clear_error(tmp_path, room):
    # A limit on the size of a file stands for the disk: the files have 42 (state) to about 500 bytes (manifest).
    store = save(CheckpointStore(tmp_path / "ppo", keep=1), 10)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        with pytest.raises(CheckpointError, match=r"cannot write .*ppo"):
            save(store, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path / "ppo") == ["step-000010"]
    assert_holds(store.latest_valid(), 10)


def test_a_disk_that_returns_other_bytes_is_noticed_before_the_old_checkpoint_is_pruned(tmp_path):
    def flip(name: str) -> None:
        if name == "before_verify":
            flip_bit(next((tmp_path / "ppo").glob("tmp-*/model.safetensors")), -1)

    save(CheckpointStore(tmp_path / "ppo", keep=1), 10)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        save(CheckpointStore(tmp_path / "ppo", keep=1, failpoint=flip), 20)
    assert os.listdir(tmp_path / "ppo") == ["step-000010"]


def test_tensors_that_were_not_written_as_given_are_noticed(tmp_path, monkeypatch):
    # Checksums cannot see this: the file is what was written, but not what was asked for.
    write = checkpoint.save_file
    monkeypatch.setattr(
        checkpoint, "save_file", lambda tensors, path: write({k: t * 0 for k, t in tensors.items()}, path)
    )
    with pytest.raises(CheckpointError, match="reads back other bytes for"):
        save(CheckpointStore(tmp_path / "ppo", keep=1), 10)
    assert os.listdir(tmp_path / "ppo") == []


def flip_bit(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def damages():
    for name in FILES:
        yield pytest.param(name, lambda path: path.unlink(), id=f"{name}-deleted")
        yield pytest.param(name, lambda path: os.truncate(path, 0), id=f"{name}-emptied")
        yield pytest.param(name, lambda path: os.truncate(path, 1), id=f"{name}-one-byte")
        yield pytest.param(name, lambda path: os.truncate(path, path.stat().st_size // 2), id=f"{name}-half")
        yield pytest.param(name, lambda path: os.truncate(path, path.stat().st_size - 1), id=f"{name}-last-byte")
        yield pytest.param(name, lambda path: path.write_bytes(path.read_bytes() + b"\n"), id=f"{name}-longer")
        for share in (0.0, 0.3, 0.6, 0.999):
            for bit in (0, 5, 7):
                yield pytest.param(
                    name,
                    lambda path, share=share, bit=bit: flip_bit(path, int(share * path.stat().st_size), bit),
                    id=f"{name}-bit-{share}-{bit}",
                )


@pytest.mark.parametrize(("name", "damage"), list(damages()))
def test_any_damage_to_any_file_is_found_and_the_older_checkpoint_is_used(tmp_path, caplog, name, damage):
    store = save(CheckpointStore(tmp_path / "ppo", keep=2), 10, 20)
    damage(tmp_path / "ppo/step-000020" / name)
    with pytest.raises(CheckpointError, match=rf"step-000020/{name}"):
        store.load(20)
    with caplog.at_level(logging.WARNING):
        found = store.latest_valid()
    assert_holds(found, 10)
    assert found is not None
    assert len(found.problems) == 1
    assert f"step-000020/{name}" in found.problems[0]
    assert f"step-000020/{name}" in caplog.text


def test_no_byte_of_the_manifest_can_change(tmp_path):
    store = save(CheckpointStore(tmp_path / "ppo", keep=1), 10)
    manifest = tmp_path / "ppo/step-000010/manifest.json"
    intact = manifest.read_bytes()
    for at in range(0, len(intact), 5):
        flip_bit(manifest, at, at % 8)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            store.load(10)
        manifest.write_bytes(intact)
    assert_holds(store.load(10), 10)


def test_an_empty_folder_is_passed_over(tmp_path):
    store = save(CheckpointStore(tmp_path / "ppo", keep=2), 10)
    (tmp_path / "ppo/step-000020").mkdir()
    assert_holds(store.latest_valid(), 10)


def test_only_damaged_checkpoints_never_restart_a_stage_silently(tmp_path):
    store = save(CheckpointStore(tmp_path / "ppo", keep=2), 10, 20)
    for step in (10, 20):
        os.truncate(tmp_path / f"ppo/step-0000{step}/state.json", 3)
    with pytest.raises(CheckpointError, match=r"no checkpoint .*step-000020.*step-000010"):
        store.latest_valid()


def test_after_a_damaged_one_the_replayed_steps_are_the_newest(tmp_path):
    # Steps 20 and 30 were passed over as damaged, and the run went on from 10: what it saves next must survive.
    store = save(CheckpointStore(tmp_path / "ppo", keep=2), 10, 20, 30, protect=(10,))
    for step in (20, 30):
        (tmp_path / f"ppo/step-0000{step}/manifest.json").unlink()
    save(store, 15, protect=(10,))
    assert store.steps() == [10, 15]
    assert_holds(store.latest_valid(), 15)


def test_a_later_layout_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    store = save(CheckpointStore(tmp_path / "ppo", keep=2), 10)
    monkeypatch.setattr(checkpoint, "SCHEMA", 2)
    save(store, 20)
    monkeypatch.setattr(checkpoint, "SCHEMA", 1)
    for read in (store.latest_valid, lambda: store.load(20)):
        with pytest.raises(CheckpointError, match="layout 2, this version reads up to 1"):
            read()


def test_a_renamed_step_folder_is_refused(tmp_path):
    store = save(CheckpointStore(tmp_path / "ppo", keep=2), 10)
    (tmp_path / "ppo/step-000010").rename(tmp_path / "ppo/step-000011")
    with pytest.raises(CheckpointError, match="does not belong to step 11"):
        store.load(11)


def test_a_removed_run_folder_is_an_error_and_is_not_made_again(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*run folder must stay in place"):
        save(CheckpointStore(tmp_path / "gone/ppo", keep=1), 1)
    assert os.listdir(tmp_path) == []


def test_file_names_cannot_leave_the_folder(tmp_path):
    with pytest.raises(AssertionError, match="file names"):
        CheckpointStore(tmp_path / "ppo", keep=1).save(1, {"../model": {}}, {})


def test_tensors_that_are_not_contiguous_are_saved(tmp_path):
    store = CheckpointStore(tmp_path / "ppo", keep=1)
    store.save(1, {"model": {"w": torch.arange(6.0).reshape(2, 3).t()}}, {})
    assert store.load(1).tensors["model"]["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
