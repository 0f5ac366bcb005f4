"""Checkpoints as they are saved: beside the next steps, the same bytes each time, and the newest kept."""

import os
import threading
import time

import pytest
import torch

from solar import snapshot
from solar.snapshot import PHASES
from tests.saving import alone, build, fill, flip, holds, save, steps

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save(alone(tmp_path / name), 1)
    one, two = (tmp_path / name / "step-00000001" / "manifest.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in one.parent.iterdir())


def test_the_next_steps_do_not_reach_what_is_being_written(root, monkeypatch):
    toy = build()
    fill(*toy, 1)
    go_on, record = threading.Event(), {"step": 1}
    monkeypatch.setattr(snapshot, "_phase", lambda name: name == "copy" or go_on.wait(60))
    snapshots = alone(root)
    snapshots.save(1, *toy, record)
    fill(*toy, 2)
    record["step"] = 2
    assert steps(root) == []
    go_on.set()
    snapshots.wait()
    assert holds(root / "step-00000001", 1)
    kept = {name: copy.data_ptr() for name, copy in snapshots._copies.items()}
    snapshots.save(2, *toy, record)
    snapshots.wait()
    assert kept == {name: copy.data_ptr() for name, copy in snapshots._copies.items()}
    assert holds(root / "step-00000002", 2)


def test_a_second_save_waits_for_the_first(root, monkeypatch):
    toy, order = build(), []
    monkeypatch.setattr(snapshot, "_phase", lambda name: [order.append(name), time.sleep(0.01)])
    snapshots = alone(root, keep=3)
    for step in (1, 2, 3):
        fill(*toy, step)
        snapshots.save(step, *toy, {"step": step})
    snapshots.close()
    once = [name for at, name in enumerate(order) if at == 0 or order[at - 1] != name]
    assert once == list(PHASES) * 3
    assert all(holds(root / f"step-{step:08}", step) for step in (1, 2, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["model.one.bias", "optimizer.embed.weight.exp_avg_sq"])
def test_a_state_that_is_not_finite_is_refused(root, bad, where):
    snapshots = alone(root)
    save(snapshots, 1)
    model, optimizer = toy = build()
    fill(*toy, 2)
    with torch.no_grad():
        target = model.one.bias if where.startswith("model") else optimizer.state[model.embed.weight]["exp_avg_sq"]
        target.view(-1)[-1] = bad
    with pytest.raises(ValueError, match=f"{where} is not finite"):
        snapshots.save(2, *toy, {})
    snapshots.wait()
    assert steps(root) == [1]
    assert holds(snapshots.latest(), 1)


# ------------------------------------------------------------------------------------------------ kept and removed


def test_the_newest_are_kept(root):
    with pytest.raises(ValueError, match="0 checkpoints to keep"):
        alone(root, keep=0)
    save(alone(root, keep=2), 10, 20, 30)
    assert steps(root) == [20, 30]
    assert (root / "latest").read_text() == "step-00000030\n"
    save(alone(root, keep=1), 40)
    assert steps(root) == [40]
    save(alone(root, keep=3), 100_000_000)
    assert steps(root) == [40, 100_000_000]
    assert holds(alone(root).latest(), 100_000_000)


def test_a_run_that_went_back_is_not_pruned_for_what_it_left_ahead(root):
    save(alone(root, keep=3), 10, 20, 30)
    snapshots = alone(root, keep=2)
    save(snapshots, 15)  # resumed from 10
    assert steps(root) == [10, 15]
    assert snapshots.latest().name == "step-00000015"
    save(alone(root, keep=4), 40, 50)
    save(alone(root, keep=5), 45)
    assert steps(root) == [10, 15, 40, 45, 50]
    (root / "step-00000045" / "config.json").unlink()
    assert alone(root).latest().name == "step-00000040"  # not 50, of which 45 knew nothing


def test_what_is_not_a_whole_checkpoint_is_neither_counted_nor_removed(root):
    save(alone(root), 1, 2)
    (root / "step-00000009").mkdir()
    (root / "step-00000009" / "thesis.txt").write_text("years")
    (root / "step-00000008").mkdir()
    (root / "step-00000008" / "manifest.json").write_text('{"format": 2}')
    (root / "step-final").mkdir()
    (root / "step-00000001" / ".metadata").unlink()
    save(alone(root), 3)
    assert {"step-00000001", "step-00000002", "step-00000003"} <= {*os.listdir(root)}
    save(alone(root, keep=1), 4)
    expected = ["latest", "step-00000001", "step-00000004", "step-00000008", "step-00000009", "step-final"]
    assert sorted(os.listdir(root)) == expected


def test_latest_passes_over_what_is_damaged_and_says_so(root, capsys):
    assert alone(root).latest() is None
    snapshots = alone(root, keep=3)
    save(snapshots, 1, 2, 3)
    capsys.readouterr()
    flip(root / "step-00000003" / "__0_0.distcp", 8000)
    (root / "step-00000002" / "manifest.json").unlink()
    assert snapshots.latest() == root / "step-00000001"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"note: passed over {root / 'step-00000003' / '__0_0.distcp'}: SHA-256 ")
    assert "step-00000002: no manifest.json" in said
    assert said.endswith("going on from step-00000001\n")
    (root / "latest").write_bytes(b"\xff../../elsewhere")
    assert snapshots.latest() == root / "step-00000001"
    flip(root / "step-00000001" / ".metadata", 80)
    assert snapshots.latest() is None
    assert capsys.readouterr().err.endswith("no other is left\n")
    save(snapshots, 2)
    assert holds(snapshots.latest(), 2)
