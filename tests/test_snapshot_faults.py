"""Saving that is killed, or refused by the disk, on any rank and at any point: `latest` loads."""

import errno
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from solar import snapshot
from solar.snapshot import PHASES
from tests.saving import (
    PROCESSES,
    across,
    alone,
    build,
    fill,
    full_disk_at,
    hidden,
    holds,
    killer,
    ranks,
    save,
    steps,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ killed


def kill_in(root: Path, where: str, nth: int, last: int) -> None:
    torch.set_num_threads(1)
    snapshots = alone(root)
    save(snapshots, 1, 2)
    if where in PHASES:
        snapshot._phase = killer(where, nth)
    elif where == "renaming":
        Path.rename = kill_after(nth, Path.rename)
    else:
        shutil.rmtree = kill_after(nth, lambda path, **_: (path / "manifest.json").unlink())
    save(snapshots, last)


def kill_after(nth: int, call):
    left = [nth]

    def then_end(*args, **kwargs):
        result = call(*args, **kwargs)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return then_end


def killed(work, *args) -> None:
    process = PROCESSES.Process(target=work, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("where", "nth", "there"),
    [
        *((phase, 1, [1, 2]) for phase in PHASES[:5]),
        *(("write", nth, [1, 2]) for nth in (2, 3, 4)),
        ("latest", 1, [1, 2, 3]),
        ("prune", 1, [1, 2, 3]),
        ("renaming", 1, [1, 2]),  # .metadata, by DCP
        ("renaming", 2, [1, 2, 3]),
        ("renaming", 3, [1, 2, 3]),  # latest
        ("renaming", 4, [2, 3]),  # out of the way, to be removed
        ("removing", 1, [2, 3]),
    ],
)
def test_killed_at_any_point(root, where, nth, there):
    killed(kill_in, root, where, nth, 3)
    assert steps(root) == there
    assert all(holds(root / f"step-{step:08}", step) for step in there)
    named = (root / "latest").read_text().strip()
    assert named == ("step-00000003" if (where, nth) in [("prune", 1), ("renaming", 3), ("renaming", 4),
                                                         ("removing", 1)] else "step-00000002")  # fmt: skip
    snapshots = alone(root)  # clears away what it left
    assert snapshots.latest().name == named
    assert {*hidden(root)} <= {".latest.partial"}
    save(snapshots, 4)
    assert sorted(os.listdir(root))[0] == "latest"
    assert holds(snapshots.latest(), 4)


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_killed_while_a_checkpoint_is_replaced(root, nth):
    killed(kill_in, root, "renaming", nth, 2)  # .metadata, aside, into place, latest
    snapshots = alone(root)
    assert steps(root) == [1, 2]
    assert holds(snapshots.latest(), 2)
    assert hidden(root) == []


def save_for_ever(root: Path, told) -> None:
    torch.set_num_threads(1)
    snapshots = alone(root)
    found = snapshots.latest()
    step = 0 if found is None else int(found.name[5:])
    assert found is None or holds(found, step)
    while True:
        step += 1
        save(snapshots, step)
        told.send(step)


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(root):
    rng, finished = random.Random(0), 0
    for _ in range(100):
        heard, told = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=save_for_ever, args=(root, told))
        process.start()
        told.close()
        time.sleep(0.5 * rng.random())
        process.kill()
        process.join()
        while heard.poll():
            try:
                finished = heard.recv()
            except EOFError:
                break
        latest = alone(root).latest()
        step = 0 if latest is None else int(latest.name[5:])
        assert step >= finished
        assert latest is None or holds(latest, step)
        assert all(holds(root / f"step-{step:08}", step) for step in steps(root))
        assert {*hidden(root)} <= {".latest.partial"}
    assert finished > 10


def test_what_a_living_run_is_writing_is_left_alone(root, monkeypatch):
    go_on, begun = threading.Event(), threading.Event()
    monkeypatch.setattr(snapshot, "_phase", lambda name: name == "fsync" and [begun.set(), go_on.wait(60)])
    snapshots, toy = alone(root), build()
    fill(*toy, 1)
    snapshots.save(1, *toy, {"step": 1})
    assert begun.wait(60)
    alone(root)
    assert len(hidden(root)) == 1
    go_on.set()
    snapshots.wait()
    assert hidden(root) == []
    assert holds(root / "step-00000001", 1)


# ------------------------------------------------------------------------------------------------ refused by the disk


@pytest.mark.parametrize("on_error", ["stop", "continue"])
@pytest.mark.parametrize("phase", PHASES)
def test_full_disk(root, phase, on_error, monkeypatch, capsys):
    snapshots = alone(root, on_error=on_error)
    save(snapshots, 1)
    monkeypatch.setattr(snapshot, "_phase", full_disk_at(phase))
    said = f"checkpoint of step 2, {phase}: no space left on the disk"
    if on_error == "stop":
        with pytest.raises(OSError, match=said):
            save(snapshots, 2)
    else:
        save(snapshots, 2)
        assert capsys.readouterr().err == f"note: {said}; going on without it\n"
    monkeypatch.undo()
    assert steps(root) == ([1, 2] if phase in ("latest", "prune") else [1])
    assert hidden(root) == []
    assert holds(snapshots.latest(), 2 if phase == "prune" else 1)
    save(snapshots, 3)
    assert holds(snapshots.latest(), 3)


def test_old_checkpoints_that_cannot_be_removed_are_no_failure(root, monkeypatch):
    """As on NFS, where another process reads in one: the next run tries again."""
    snapshots, remove = alone(root, keep=1), shutil.rmtree

    def refused(path, ignore_errors=False):
        if ".partial-" in Path(path).name and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        if ".partial-" not in Path(path).name:
            remove(path, ignore_errors)

    monkeypatch.setattr(snapshot.shutil, "rmtree", refused)
    for step in (1, 2):
        save(snapshots, step)
        assert snapshots.written == root / f"step-{step:08}"
    assert steps(root) == [2]
    assert len(hidden(root)) == 1
    monkeypatch.undo()
    alone(root)
    assert hidden(root) == []


@pytest.mark.parametrize("limit", [100, 8_000, 200_000])
def test_a_write_that_fails_half_way(root, limit):
    """The last within a tensor, of which torch reports something else; the message still says what the disk said."""
    snapshots, large = alone(root), build(nn.Linear(300, 300))
    save(snapshots, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint of step 2, write: .*File too large"):
            [snapshots.save(2, *large, {}), snapshots.wait()]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(root)) == ["latest", "step-00000001"]
    assert holds(snapshots.latest(), 1)
    save(snapshots, 2)
    assert holds(snapshots.latest(), 2)


def test_a_directory_that_cannot_be_written(root, capsys):
    root.write_text("a file in its place")
    with pytest.raises(OSError, match=r"starting on checkpoints: .*File exists"):
        alone(root)
    root.unlink()
    snapshots = alone(root, on_error="continue")
    root.rmdir()
    save(snapshots, 1)
    assert "checkpoint of step 1, write: " in capsys.readouterr().err
    root.mkdir()
    save(snapshots, 2)
    assert holds(snapshots.latest(), 2)


def test_other_failures_are_never_passed_over(root, monkeypatch):
    snapshots = alone(root, on_error="continue")
    monkeypatch.setattr(snapshot, "seal", lambda content: 1 / 0)
    with pytest.raises(RuntimeError, match="step 1, manifest: division by zero"):
        save(snapshots, 1)
    assert steps(root) == hidden(root) == []


@pytest.mark.parametrize("phase", ["fsync", "manifest", "rename"])
def test_a_replacement_that_fails_leaves_the_old_one(root, phase, monkeypatch):
    snapshots, other = alone(root), build()
    save(snapshots, 1)
    fill(*other, 7)
    monkeypatch.setattr(snapshot, "_phase", full_disk_at(phase))
    with pytest.raises(OSError, match="no space"):
        [snapshots.save(1, *other, {"step": 7}), snapshots.wait()]
    monkeypatch.undo()

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: _fail() if ".partial-" in self.name else rename(self, to))
    with pytest.raises(OSError, match="Input/output"):
        [snapshots.save(1, *other, {"step": 7}), snapshots.wait()]
    monkeypatch.undo()
    assert holds(root / "step-00000001", 1)
    assert hidden(root) == []
    snapshots.save(1, *other, {"step": 7})
    snapshots.wait()
    assert holds(root / "step-00000001", 7)
    assert hidden(root) == []


def _fail():
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# ------------------------------------------------------------------------------------------------ several ranks


def fail_on_one_rank(group, root: Path, on_error: str) -> None:
    snapshots = across(group, root, on_error=on_error)
    toy = build(sharded=True)
    fill(*toy, 1)
    snapshots.save(1, *toy, {"step": 1})
    snapshots.wait()
    for phase in PHASES[:3]:  # the others are rank 0's alone
        snapshot._phase = lambda name, phase=phase: dist.get_rank() and full_disk_at(phase)(name)
        if on_error == "stop":
            with pytest.raises(OSError, match=rf"checkpoint of step 2, {phase} on rank 1: no space left on the disk"):
                [snapshots.save(2, *toy, {"step": 2}), snapshots.wait()]
        else:
            snapshots.save(2, *toy, {"step": 2})
            snapshots.wait()
        snapshot._phase = lambda name: None
        if dist.get_rank() == 0:
            assert sorted(os.listdir(root)) == ["latest", "step-00000001"]
    fill(*toy, 2)
    with torch.no_grad():
        next(toy[0].parameters()).to_local()[-dist.get_rank() :] = float("nan") if dist.get_rank() else 0.0
    with pytest.raises(ValueError, match=r"copy on rank 1: model\.embed\.weight is not finite"):
        snapshots.save(2, *toy, {"step": 2})
    assert steps(root) == [1]
    fill(*toy, 2)
    snapshots.save(2, *toy, {"step": 2})
    snapshots.close()
    if dist.get_rank() == 0:
        assert holds(root / "step-00000001", 1)
        assert holds(root / "step-00000002", 2)


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_what_fails_on_one_rank_fails_on_all(root, on_error):
    ranks(2, fail_on_one_rank, root, on_error)


def lose_rank_1(group, root: Path, phase: str) -> None:
    snapshots = across(group, root)
    toy = build(sharded=True)
    for step in (1, 2):
        fill(*toy, step)
        snapshots.save(step, *toy, {"step": step})
        if step == 1:
            snapshots.wait()
            if dist.get_rank() == 1:
                snapshot._phase = killer(phase, 1)
    with pytest.raises(RuntimeError):
        snapshots.wait()
    os._exit(0)  # its peer is gone


@pytest.mark.parametrize("phase", ["fsync", *(pytest.param(name, marks=pytest.mark.slow) for name in PHASES[3:])])
def test_a_rank_that_dies_takes_no_checkpoint_along(root, phase):
    ranks(2, lose_rank_1, root, phase, killed=(1,))
    latest = alone(root).latest()
    assert holds(latest, int(latest.name[5:]))
    assert holds(root / "step-00000001", 1)
    assert hidden(root) == []
