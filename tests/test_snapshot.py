"""Checkpoints: what is loaded is what was saved, bit for bit; whatever is killed or damaged, `latest` loads."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from solar import cli, snapshot
from solar.checkpoint import load_model
from solar.config import TINY, ModelConfig
from solar.model import Transformer
from solar.snapshot import PHASES, Snapshots, export, load, verify
from tests.golden import tiny

# Ranks are forked from a server that has imported everything once and started no thread.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.test_snapshot", "torch._dynamo"])  # which DTensor imports later
SMALL = ModelConfig.from_hf(tiny.CASES["llama_gqa_head_dim"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Toy(nn.Module):
    """Sizes that no number of ranks divides, one row that most ranks have none of, a frozen weight, a tied one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 7)
        self.frozen = nn.Linear(7, 6, bias=False)
        self.one = nn.Linear(6, 1)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        x = self.frozen(self.up(self.embed(ids)).tanh())
        return self.head(x) * self.one(x)


def build(model: nn.Module | None = None, dtype=torch.float32, sharded: bool = False, replicas: int = 1, **adamw):
    """A model and its AdamW, over all ranks there are."""
    model = (Toy() if model is None else model).to(dtype)
    if sharded:
        size = dist.get_world_size()
        mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
        mesh = mesh["shard"] if replicas == 1 else mesh
        for layer in model.model.layers if isinstance(model, Transformer) else [model.up]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-2, **adamw)


@torch.no_grad()
def fill(model, optimizer, seed: int) -> None:
    """Weights and moments that depend on the seed and their names, and on nothing else."""
    model.state_dict()
    for name, parameter in model.named_parameters():
        put(parameter, f"{name} {seed}")
        if parameter.requires_grad:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            for key, moment in moments.items():
                put(moment, f"{name} {key} {seed}")
            optimizer.state[parameter] = {"step": torch.tensor(float(seed)), **moments}


def put(target: Tensor, name: str) -> None:
    values = drawn(name, target.shape, target.dtype)
    if isinstance(target, DTensor):
        values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)


def drawn(name: str, shape, dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).to(dtype)


def state_of(model, optimizer) -> dict[str, Tensor]:
    """Everything, whole, as copies."""
    model.state_dict()
    whole = lambda tensor: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = whole(parameter)
        state |= {f"{name} {key}": whole(value) for key, value in optimizer.state.get(parameter, {}).items()}
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    bits = lambda tensor: tensor.contiguous().reshape(-1).view(torch.uint8)
    return one.keys() == other.keys() and all(
        a.dtype == other[name].dtype and a.shape == other[name].shape and torch.equal(bits(a), bits(other[name]))
        for name, a in one.items()
    )


def holds(path: Path, seed: int) -> bool:
    """Whether a checkpoint of a Toy in one process is what `fill` with this seed makes."""
    found, expected = build(), build()
    fill(*expected, seed)
    record = load(path, *found)
    return record == {"step": seed} and same(state_of(*found), state_of(*expected))


def alone(root: Path, keep: int = 2, config=SMALL, companions=None, on_error="stop") -> Snapshots:
    return Snapshots(root, keep, 0, 1, None, config, companions, on_error)


def save(snapshots: Snapshots, *seeds: int) -> None:
    """A Toy at each of these steps, filled with the step as seed."""
    toy = build()
    for seed in seeds:
        fill(*toy, seed)
        snapshots.save(seed, *toy, {"step": seed})
        snapshots.wait()


def steps(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("step-*"))


def hidden(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "checkpoints"


# ------------------------------------------------------------------------------------------------ several ranks


def ranks(size: int, work, *args, killed: tuple[int, ...] = ()) -> None:
    """Run work(group, *args) on that many gloo ranks; all but the killed must end well."""
    store = Path(args[0]).parent / f"store-{time.monotonic_ns()}"
    processes = [PROCESSES.Process(target=_rank, args=(rank, size, str(store), work, args)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [-signal.SIGKILL if rank in killed else 0 for rank in range(size)]


def _rank(rank: int, size: int, store: str, work, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    work(dist.new_group(backend="gloo"), *args)
    dist.destroy_process_group()


def across(group, root: Path, keep: int = 2, on_error="stop", config=SMALL) -> Snapshots:
    return Snapshots(root, keep, dist.get_rank(), dist.get_world_size(), group, config, None, on_error)


def load_and_save_on(group, root: Path, loaded: int | None, saved: int) -> None:
    snapshots = across(group, root)
    model, optimizer = build(sharded=True)
    if loaded is not None:
        assert load(snapshots.latest(), model, optimizer, group) == {"step": loaded}
        one, two = state_of(model, optimizer), build(sharded=True)
        fill(*two, loaded)
        assert same(one, state_of(*two))
    fill(model, optimizer, saved)
    snapshots.save(saved, model, optimizer, {"step": saved})
    snapshots.close()


def test_two_ranks_and_one(root):
    ranks(2, load_and_save_on, root, None, 1)
    assert holds(root / "step-00000001", 1)  # in one process, without FSDP
    save(alone(root), 2)
    ranks(2, load_and_save_on, root, 2, 3)
    ranks(1, load_and_save_on, root, 3, 4)


@pytest.mark.slow
def test_more_ranks_than_some_tensors_have_rows(root):
    for loaded, (size, saved) in zip([None, 1, 2, 3, 4], [(3, 1), (2, 2), (4, 3), (1, 4), (3, 5)], strict=True):
        ranks(size, load_and_save_on, root, loaded, saved)
    assert holds(root / "step-00000005", 5)


def save_replicas(group, root: Path) -> None:
    toy, again = build(sharded=True, replicas=2), build(sharded=True, replicas=2)
    fill(*toy, 1)
    snapshots = across(group, root)
    snapshots.save(1, *toy, {"step": 1})
    snapshots.close()
    load(snapshots.latest(), *again, group)
    assert same(state_of(*toy), state_of(*again))


@pytest.mark.slow
def test_hybrid_sharding_stores_one_copy(root):
    ranks(4, save_replicas, root)
    save(alone(root), 2)
    size = lambda step: sum(file.stat().st_size for file in (root / f"step-{step:08}").glob("*.distcp"))
    assert holds(root / "step-00000001", 1)
    assert size(1) < 1.9 * size(2)


def train_and_resume(group, root: Path) -> None:
    config = SMALL
    batches = [torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def start(seed):
        model = Transformer(config)
        model.init_weights(seed)
        return build(model, sharded=True, fused=True)

    def run(model, optimizer, batches):
        for ids in batches:
            model(ids, labels=ids).sum().neg().backward()
            optimizer.step()
            optimizer.zero_grad()

    snapshots, (model, optimizer) = across(group, root), start(0)
    run(model, optimizer, batches[:3])
    with torch.no_grad():
        model(batches[0])  # as an evaluation does, and leaves parameters gathered
    snapshots.save(3, model, optimizer, {"step": 3})
    run(model, optimizer, batches[3:])  # while it is written
    snapshots.close()

    resumed = start(1)
    run(*resumed, batches[5:])  # moments of its own, to be replaced
    assert load(snapshots.latest(), *resumed, group, verified=True) == {"step": 3}
    run(*resumed, batches[3:])
    assert same(state_of(model, optimizer), state_of(*resumed))


@pytest.mark.parametrize("size", [1, 2])
def test_training_goes_on_bit_for_bit(root, size):
    ranks(size, train_and_resume, root)


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


# ------------------------------------------------------------------------------------------------ one process


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(root, dtype, fused):
    saved, loaded = build(dtype=dtype, fused=fused), build(dtype=dtype, fused=fused)
    fill(*saved, 1)
    snapshots = alone(root)
    snapshots.save(1, *saved, {"step": 1, "options": {"lr": 0.1, "data": ["ä"]}})
    snapshots.close()
    assert load(snapshots.latest(), *loaded) == {"step": 1, "options": {"lr": 0.1, "data": ["ä"]}}
    assert same(state_of(*saved), state_of(*loaded))
    for model, optimizer in (saved, loaded):
        model(torch.arange(11)).float().sum().backward()
        optimizer.step()
    assert same(state_of(*saved), state_of(*loaded))


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save(alone(tmp_path / name), 1)
    one, two = (tmp_path / name / "step-00000001" / "manifest.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in one.parent.iterdir())


def test_before_the_first_step_there_are_no_moments(root):
    saved, loaded = build(), build()
    fill(*loaded, 1)
    snapshots = alone(root)
    snapshots.save(0, *saved, {})
    snapshots.close()
    assert load(root / "step-00000000", *loaded) == {}
    assert same(state_of(*saved), state_of(*loaded))
    assert not loaded[1].state


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


def test_a_checkpoint_of_another_model_is_refused(root):
    save(alone(root), 1)
    path = root / "step-00000001"

    def refused(change, match, **kwargs):
        toy = Toy()
        change(toy)
        model, optimizer = build(toy, **kwargs)
        before = state_of(model, optimizer)
        with pytest.raises(ValueError, match=match):
            load(path, model, optimizer)
        assert same(before, state_of(model, optimizer))

    refused(lambda toy: setattr(toy, "up", nn.Linear(6, 8)), r"model\.up\.bias is \[7\] float32 in it, \[8\] float32")
    refused(lambda toy: setattr(toy, "more", nn.Linear(2, 2)), r"model\.more\.bias is not in it")
    refused(lambda toy: delattr(toy, "frozen"), r"model\.frozen\.weight of it is not in the model")
    refused(lambda toy: None, "float32 in it, .* bfloat16", dtype=torch.bfloat16)
    refused(lambda toy: toy.up.requires_grad_(False), r"optimizer\.up\.bias\.exp_avg of it belongs to nothing")


# ------------------------------------------------------------------------------------------------ killed


def killer(phase: str, nth: int = 1):
    """A `_phase` that is the end of its process."""
    left = [nth]

    def end(name):
        left[0] -= name == phase
        if name == phase and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return end


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


def full_disk_at(phase: str):
    def fail(name):
        if name == phase:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fail


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
    monkeypatch.setattr(snapshot, "_seal", lambda content: 1 / 0)
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
    into_place = lambda self, to: full_disk_at("")("") if ".partial" in self.name and to.name[0] != "." else None
    monkeypatch.setattr(Path, "rename", lambda self, to: into_place(self, to) or rename(self, to))
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


# ------------------------------------------------------------------------------------------------ damaged and foreign


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_flipped_bit_is_found_before_anything_is_unpickled(root, monkeypatch):
    save(alone(root), 1)
    path, toy, rng = root / "step-00000001", build(), random.Random(0)
    monkeypatch.setattr(snapshot, "_MetadataReader", None)
    files = sorted(path.iterdir())
    assert [file.name for file in files] == [".metadata", "__0_0.distcp", "config.json", "manifest.json"]
    for file in files:
        for _ in range(150):
            bit = rng.randrange(8 * file.stat().st_size)
            flip(file, bit)
            with pytest.raises(ValueError, match=file.name) as caught:
                load(path, *toy)
            assert "\n" not in str(caught.value)
            flip(file, bit)
    assert verify(path) == {"step": 1}


@pytest.mark.slow
def test_every_bit_of_a_manifest(root):
    save(alone(root), 1)
    path = root / "step-00000001"
    for bit in range(8 * (path / "manifest.json").stat().st_size):
        flip(path / "manifest.json", bit)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            verify(path)
        flip(path / "manifest.json", bit)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "config.json", "manifest.json"])
def test_files_that_are_cut_longer_or_missing(root, name):
    save(alone(root), 1)
    path = root / "step-00000001"
    data = (path / name).read_bytes()
    for changed in (data[:-1], data + b"\n", b""):
        (path / name).write_bytes(changed)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            verify(path)
    (path / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=name.replace(".", r"\.")):
        verify(path)


def test_foreign_directories_are_refused(tmp_path):
    for content in (None, b"", b"[]", b"{}", b'{"format": 2}', b'{"format": 1}', b"\xff", b"[" * 100_000):
        if content is not None:
            (tmp_path / "manifest.json").write_bytes(content)
        for refuse in (verify, lambda path: load(path, *build()), lambda path: export(path, tmp_path / "out")):
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                refuse(tmp_path)
            assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="not a checkpoint of this program"):
        verify(tmp_path / "nowhere")
    for files in ([], {}, {".metadata": {}, "../config.json": {}}, {".metadata": {}}):
        (tmp_path / "manifest.json").write_bytes(snapshot._seal({"format": 1, "step": 1, "record": {}, "files": files}))
        with pytest.raises(ValueError):
            verify(tmp_path)


class Malice:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def reseal(path: Path, metadata: bytes) -> None:
    """Another `.metadata`, and a manifest that agrees with it: what a stranger can do."""
    (path / ".metadata").write_bytes(metadata)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][".metadata"] = {"bytes": len(metadata), "sha256": cli.file_sha256(path / ".metadata")}
    (path / "manifest.json").write_bytes(snapshot._seal(manifest))


def test_metadata_of_a_stranger_runs_nothing(root, tmp_path):
    save(alone(root), 1)
    path, trace = root / "step-00000001", tmp_path / "trace"
    dotted = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c\x04true\x85R."
    for metadata in (
        pickle.dumps(Malice(os.system, f"touch {trace}")),
        pickle.dumps(Malice(eval, f"open({str(trace)!r}, 'w')")),
        pickle.dumps(Malice(torch.load, str(trace))),
        dotted,
        b"",
        b"not a pickle",
        pickle.dumps([1]),
    ):
        reseal(path, metadata)
        verify(path)  # it is what its manifest says
        with pytest.raises(ValueError, match=r"\.metadata: not written by this program"):
            load(path, *build())
        assert not trace.exists()


def test_metadata_that_points_elsewhere_is_refused(root):
    save(alone(root), 1)
    path = root / "step-00000001"
    metadata = snapshot._read_metadata(path, snapshot.read_manifest(path))
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    reseal(path, pickle.dumps(metadata))
    with pytest.raises(ValueError, match="elsewhere' is not in the manifest"):
        load(path, *build())
    metadata.state_dict_metadata["model.one.bias"] = BytesStorageMetadata()  # DCP would unpickle what lies there
    reseal(path, pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"model\.one\.bias is not a tensor"):
        load(path, *build())


# ------------------------------------------------------------------------------------------------ exporting


@pytest.fixture
def source(tmp_path) -> Path:
    """A model directory to have been trained from."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(b"\0tokens\r\n")
    (source / "upscale.json").write_text('{"plan": []}')
    (source / "notes.txt").write_text("mine")
    return source


@pytest.mark.parametrize("case", ["llama_gqa_head_dim", "llama_tied", "mistral_window"])
def test_export(root, tmp_path, source, case):
    config = ModelConfig.from_hf(tiny.CASES[case])
    model, optimizer = build(Transformer(config))
    fill(model, optimizer, 1)
    snapshots = alone(root, config=config, companions=source)
    shutil.rmtree(source)  # a checkpoint stands for itself
    snapshots.save(1, model, optimizer, {"step": 1})
    snapshots.close()
    step_dir, out = root / "step-00000001", tmp_path / "out"
    assert export(step_dir, out) == out
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.model", "upscale.json"]
    assert (out / "tokenizer.model").read_bytes() == b"\0tokens\r\n"
    exported = load_model(out)
    assert exported.config == config
    assert same(dict(model.state_dict()), dict(exported.state_dict()))

    with pytest.raises(FileExistsError, match="--force"):
        export(step_dir, out, "bfloat16")
    export(step_dir, out, "bfloat16", force=True)
    half = load_model(out)
    assert half.config.torch_dtype == "bfloat16"
    assert same({name: t.bfloat16() for name, t in model.state_dict().items()}, dict(half.state_dict()))
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    snapshots.save(2, model, optimizer, {"step": 2})
    snapshots.close()
    with pytest.raises(ValueError, match=r"model\.norm\.weight: values up to 1e\+06 do not fit"):
        export(root / "step-00000002", tmp_path / "overflow", "float16")
    assert not (tmp_path / "overflow").exists()


def export_of_two(group, root: Path) -> None:
    model, optimizer = build(Transformer(SMALL), sharded=True)
    fill(model, optimizer, 1)
    snapshots = across(group, root)
    snapshots.save(1, model, optimizer, {"step": 1})
    snapshots.close()


def test_export_of_what_several_ranks_saved(root, tmp_path, monkeypatch, capsys):
    ranks(2, export_of_two, root)
    model, optimizer = build(Transformer(SMALL))
    fill(model, optimizer, 1)
    monkeypatch.setattr(sys, "argv", ["snapshot", "export", str(root / "step-00000001"), str(tmp_path / "out")])
    snapshot.main()
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert same(dict(model.state_dict()), dict(load_model(tmp_path / "out").state_dict()))


def test_a_checkpoint_whose_config_is_of_another_model_is_not_exported(root, tmp_path):
    save(alone(root, config=TINY), 1)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is missing, its config\.json implies"):
        export(root / "step-00000001", tmp_path / "out")
    assert not (tmp_path / "out").exists()
