"""Up-scalings and merges that are killed, stopped, or refused by the disk at any step; bases that change meanwhile.

Whatever happens: the base is what it was, and the output is what it was (absent, or an older model) or whole.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from solar import cli, directory, tensorfile
from solar import merge as merging
from solar import upscale as upscaling
from solar.checkpoint import load_model
from solar.merge import merge
from solar.upscale import upscale
from tests.golden import tiny
from tests.test_checkpoint import snapshot
from tests.test_upscale import FOUR, Nursery, one_line

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL_BASE = Path(__file__).resolve().parent.parent / "solar/assets/base"
SHARD = 30_000  # bytes: a handful of shards of the tiny base
IN_A_NAMESPACE = ("unshare", "--mount", "--map-root-user")  # where anyone may mount, and nobody else sees it


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two directories of one shape in bfloat16, each with files of a tokenizer, one of them large."""
    folder = tmp_path_factory.mktemp("bases")
    for seed, name in enumerate("AB"):
        tiny.write(FOUR, folder / name, "bfloat16", seed=seed)
        (folder / name / "tokenizer.model").write_bytes(b"\n\x0e pieces")
        (folder / name / "tokenizer.json").write_bytes(b" " * 50_000)
    return folder / "A", folder / "B"


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """Where a job may mount a filesystem of its own, if this system lets anyone."""
    has = shutil.which("unshare") and not subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True).returncode
    nursery = Nursery(tmp_path_factory.mktemp("nursery"), prefix=IN_A_NAMESPACE if has else ())
    nursery.mounts = bool(has)
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(10)


@pytest.fixture
def mounting(nursery):
    if not nursery.mounts:
        pytest.skip("this system lets nobody mount in a namespace of their own")
    return nursery


# ------------------------------------------------------------------------------------------------ steps

# `at(owner, name, nth, when)` sends this process a signal before or after the nth call of a function that goes well; of
# those whose arguments are as `counts` wants them.
AT = """
import os, pathlib, shutil
import solar.cli, solar.directory, solar.tensorfile
def at(owner, name, nth=1, when="after", counts=lambda *_, **__: True):
    real, calls = getattr(owner, name), []
    def called(*arguments, **more):
        if not counts(*arguments, **more):
            return real(*arguments, **more)
        if when == "before" and len(calls) + 1 == nth:
            calls.append(name)
            os.kill(os.getpid(), SIGNAL)
        result = real(*arguments, **more)
        calls.append(name)
        if when == "after" and len(calls) == nth:
            os.kill(os.getpid(), SIGNAL)
        return result
    setattr(owner, name, called)
def refuse(*arguments):
    raise OSError(22, "Invalid argument")
"""
IN_TWO = "; solar.cli._exchange = refuse"  # names that cannot change places in one step

# Step -> the code that sends the signal there.
BEFORE_THE_SWAP = {
    "base opened": "at(solar.directory.CheckpointReader, '__init__')",
    "staging directory made": "at(os, 'mkdir')",
    "header written": "at(solar.tensorfile, 'write_all')",
    "first shard half written": "at(os, 'copy_file_range', 3)",
    "first shard written": "at(solar.tensorfile, 'write_safetensors')",
    "second shard half written": "at(os, 'copy_file_range', 20)",
    "index written": "at(solar.tensorfile, 'write_shards')",
    "tokenizer half copied": "at(shutil, 'copyfile')",
    "config written": "at(solar.directory, 'write_config')",
    "half verified": "at(solar.tensorfile.StoredTensor, 'read', 40)",
    "verified": "at(solar.directory, 'verify_written')",
    "first shard fsynced": "at(os, 'fsync')",
    "all fsynced": "at(solar.cli, '_swap', 1, 'before')",
}
AFTER_THE_SWAP = {
    "renamed": "at(solar.cli, '_swap')",
    "renamed and fsynced": "at(solar.cli, 'fsync', counts=lambda path: path.name == 'there')",
}
ONLY_WHEN_REPLACING = {
    "old one about to be removed": "at(shutil, 'rmtree', 1, 'before')",
    "old one half removed": "at(os, 'unlink')",
    "of two renames, the last": "at(pathlib.Path, 'rename', 3)" + IN_TWO,
    "of two renames, the second": "at(pathlib.Path, 'rename', 2)" + IN_TWO,
}
BETWEEN_TWO_RENAMES = "at(pathlib.Path, 'rename', 1)" + IN_TWO
STEPS = BEFORE_THE_SWAP | AFTER_THE_SWAP | ONLY_WHEN_REPLACING
CASES = [(step, force) for step in STEPS for force in (False, True) if force or step not in ONLY_WHEN_REPLACING]


def signalled(number: signal.Signals, code: str) -> str:
    return f"SIGNAL = {int(number)}\n{AT}\n{code}"


class Models(SimpleNamespace):
    """A base, an older output in `out` where it is to be replaced, and what the command makes of it."""

    def __init__(self, bases: tuple[Path, Path], folder: Path, force: bool, command: str = "upscale", shard=SHARD):
        self.sources, self.folder, self.out, self.force = bases, folder / "there", folder / "there" / "out", force
        self.before = [snapshot(source) for source in bases]
        self.folder.mkdir()
        if force:
            upscale(bases[1], self.out, "copy")
        self.old = snapshot(self.out) if force else None
        if command == "upscale":
            upscale(bases[0], folder / "new", "dus:1", max_shard_bytes=shard)
            self.argv = ["--model", bases[0], "--plan", "dus:1"]
        else:
            merge(bases, folder / "new", "slerp", max_shard_bytes=shard)
            self.argv = ["--models", *bases, "--method", "slerp"]
        self.new, self.command = snapshot(folder / "new"), command
        self.argv += ["--out", self.out, "--max-shard-bytes", shard, *(["--force"] if force else [])]

    def run(self, nursery: Nursery, before: str = "") -> SimpleNamespace:
        return nursery.run(*self.argv, module=f"solar.{self.command}", before=before)

    def there(self) -> str:
        """What stands at `out`; asserts that it is one or the other, and that the sources are what they were."""
        assert [snapshot(source) for source in self.sources] == self.before
        if not self.out.exists():
            assert not self.force, "the old one is gone, and the new one has not come"
            return "old"
        found = snapshot(self.out)
        assert found in (self.old, self.new)
        load_model(self.out)
        return "old" if found == self.old else "new"

    def left(self) -> list[str]:
        """What else stands beside it."""
        return [name for name in os.listdir(self.folder) if name != "out"]

    def again(self, nursery: Nursery) -> None:
        """The next run does it, and removes what the last one left."""
        there = self.there()
        done = self.run(nursery)
        if there == "new" and not self.force:
            assert "out exists already" in one_line(done)
        else:
            assert (done.code, done.err) == (0, "")
        assert self.there() == "new"
        assert self.left() == []


# ------------------------------------------------------------------------------------------------ killed


@pytest.mark.parametrize(("step", "force"), CASES)
def test_killed_at_any_step(step, force, nursery, bases, tmp_path):
    models = Models(bases, tmp_path, force)
    done = models.run(nursery, signalled(signal.SIGKILL, STEPS[step]))
    assert done.code == -signal.SIGKILL
    assert models.there() == ("old" if step in BEFORE_THE_SWAP else "new")
    assert all(name.startswith((".out.partial-", ".out.replaced")) for name in models.left())
    assert len(models.left()) == (step != "base opened" and (force or step in BEFORE_THE_SWAP))
    models.again(nursery)


def test_killed_between_two_renames_the_old_one_comes_back(nursery, bases, tmp_path):
    """Where no system call makes two names change places, there is a moment with nothing at `out`."""
    models = Models(bases, tmp_path, force=True)
    for code in (BETWEEN_TWO_RENAMES, BETWEEN_TWO_RENAMES.replace("1)", "2)")):  # the second first puts it back
        done = models.run(nursery, signalled(signal.SIGKILL, code))
        assert done.code == -signal.SIGKILL
        assert sorted(name[:10] for name in models.left()) == [".out.parti", ".out.repla"]
        assert not models.out.exists()
    done = nursery.run(*models.argv[:-1])  # without --force: it is there again, and in the way
    assert "out exists already" in one_line(done)
    assert models.left() == []
    assert models.there() == "old"
    models.again(nursery)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("step", ["first shard half written", "verified", "all fsynced", "renamed"])
def test_a_merge_that_is_killed(step, force, nursery, bases, tmp_path):
    models = Models(bases, tmp_path, force, "merge")
    code = STEPS[step].replace("os, 'copy_file_range'", "solar.tensorfile, 'write_all'")
    assert models.run(nursery, signalled(signal.SIGKILL, code)).code == -signal.SIGKILL
    assert models.there() == ("old" if step in BEFORE_THE_SWAP else "new")
    assert len(models.left()) == (force or step in BEFORE_THE_SWAP)
    models.again(nursery)


# A run says when it has begun; what is measured and cut short is the time from there to its end.
SAY = """
import solar.cli
def saying(main, run=solar.cli.run):
    def begin():
        print("begun", flush=True)
        main()
    run(begin)
solar.cli.run = saying
"""


def begin(nursery: Nursery, argv) -> SimpleNamespace:
    job = nursery.start(*argv, before=SAY)
    deadline = time.monotonic() + 20
    while "begun" not in job.out.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    return job


@pytest.mark.parametrize(
    ("number", "count"),
    [(signal.SIGKILL, 3)]
    + [pytest.param(n, 100, marks=pytest.mark.slow) for n in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)],
)
@pytest.mark.parametrize("force", [False, True])
def test_stopped_at_random_moments(force, number, count, nursery, bases, tmp_path):
    """A base of 11 MB, written in three shards: most of the time it is in the middle of something."""
    models = Models((SMALL_BASE, bases[1]), tmp_path, force, shard=4_000_000)
    start = time.monotonic()
    nursery.finish(begin(nursery, models.argv))
    takes = time.monotonic() - start
    assert models.there() == "new"
    rng, seen = random.Random(count), {"old": 0, "new": 0}
    for _ in range(count):
        shutil.rmtree(models.out, ignore_errors=True)
        if force:
            upscale(bases[1], models.out, "copy")
        job = begin(nursery, models.argv)
        time.sleep(takes * rng.random())
        done = nursery.finish(job, number)
        there = models.there()
        seen[there] += 1
        assert there == "new" or done.code != 0
        if number == signal.SIGKILL:
            assert done.code in (-signal.SIGKILL, 0)
        else:
            assert (done.code, done.err) in [(0, ""), (128 + number, said(number))]
            assert models.left() == []
    print(f"{number.name} {count} times: {seen}")
    assert seen["old"] >= count // 4
    models.again(nursery)


# ------------------------------------------------------------------------------------------------ stopped


def said(number: signal.Signals) -> str:
    return {signal.SIGINT: "interrupted\n", signal.SIGTERM: "terminated\n"}[number]


@pytest.mark.parametrize("step", STEPS)
def test_stopped_at_any_step(step, nursery, bases, tmp_path):
    """Ctrl-C and a batch system's SIGTERM: one line, nothing left, and before the last step nothing has changed."""
    models = Models(bases, tmp_path, force=True)
    for number in (signal.SIGTERM, signal.SIGINT) if step in BEFORE_THE_SWAP else (signal.SIGINT,):
        done = models.run(nursery, signalled(number, STEPS[step]))
        assert (done.code, done.err) == (128 + number, said(number))
        assert models.left() == []
        assert models.there() in (["old"] if step in BEFORE_THE_SWAP else ["old", "new"])


def test_stopped_between_two_renames(nursery, bases, tmp_path):
    models = Models(bases, tmp_path, force=True)
    done = models.run(nursery, signalled(signal.SIGTERM, BETWEEN_TWO_RENAMES))
    assert (done.code, done.err) == (143, "terminated\n")
    assert (models.there(), models.left()) == ("old", [])


# ------------------------------------------------------------------------------------------------ refused by the disk

CALLS = {
    "copy_file_range": (os, "copy_file_range"),
    "fsync": (os, "fsync"),
    "mkdir": (os, "mkdir"),
    "rename": (os, "rename"),
    "exchange": (cli, "_exchange"),
    "chmod": (os, "chmod"),
    "write": (tensorfile, "write_all"),
    "write_text": (Path, "write_text"),
    "copyfile": (shutil, "copyfile"),
}


def failing(monkeypatch, owner, name: str, nth: int, number: int) -> list[int]:
    """Let the nth call fail (none for 0). The list counts them."""
    real, calls = getattr(owner, name), [0]

    def call(*arguments, **more):
        calls[0] += 1
        if calls[0] == nth:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_that_the_disk_may_refuse(call, force, bases, tmp_path, monkeypatch):
    """The first, the last, and some in between: an error of one line that names a file, and everything is as it was.
    Where names cannot change places, they do in two steps."""
    models = Models(bases, tmp_path, force)
    again = lambda: upscale(bases[0], models.out, "dus:1", max_shard_bytes=SHARD, force=force)
    with monkeypatch.context() as patched:
        calls = failing(patched, *CALLS[call], 0, 0)
        again()
    assert models.there() == "new"
    assert calls[0] == {"rename": not force, "exchange": force, "chmod": 1}.get(call, calls[0]) or call == "mkdir"
    turns = sorted({1, 2, calls[0] // 2, calls[0] - 1, calls[0]} & {*range(1, calls[0] + 1)})
    for nth in turns:
        shutil.rmtree(models.out)
        if force:
            upscale(bases[1], models.out, "copy")
        with monkeypatch.context() as patched:
            failing(patched, *CALLS[call], nth, errno.ENOSPC if nth % 2 else errno.EIO)
            if call == "exchange" or (call, nth) == ("mkdir", 1):  # the parent is there already
                again()
                assert models.there() == "new"
            else:
                with pytest.raises(OSError) as failure:
                    again()
                message = cli.describe(failure.value)
                assert message.startswith(f"{models.folder}/")
                assert message.endswith(": no space left on the disk" if nth % 2 else ": Input/output error")
                assert models.there() == "old"
        assert models.left() == []
        again() if models.there() == "old" else None


@pytest.mark.parametrize("force", [False, True])
def test_a_merge_that_the_disk_refuses(force, bases, tmp_path, monkeypatch):
    models = Models(bases, tmp_path, force, "merge")
    again = lambda: merge(bases, models.out, "slerp", max_shard_bytes=SHARD, force=force)
    for call, nth in (("write", 1), ("write", 9), ("copyfile", 2), ("write_text", 2), ("fsync", 1), ("fsync", 9)):
        with monkeypatch.context() as patched:
            failing(patched, *CALLS[call], nth, errno.ENOSPC)
            with pytest.raises(OSError) as failure:
                again()
        assert cli.describe(failure.value).endswith(": no space left on the disk")
        assert (models.there(), models.left()) == ("old", [])
    again()
    assert models.there() == "new"


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_two_renames_of_which_one_fails(nth, bases, tmp_path, monkeypatch):
    models = Models(bases, tmp_path, force=True)
    with monkeypatch.context() as patched:
        failing(patched, cli, "_exchange", 1, errno.EINVAL)
        failing(patched, os, "rename", nth, errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            upscale(bases[0], models.out, "dus:1", max_shard_bytes=SHARD, force=True)
    assert models.there() == ("new" if nth == 3 else "old")
    upscale(bases[0], models.out, "dus:1", max_shard_bytes=SHARD, force=True)
    assert (models.there(), models.left()) == ("new", [])


MOUNT = """
import os, shutil, subprocess, types
os.makedirs({folder!r}, exist_ok=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "{options}", "none", {folder!r}], check=True)
"""
LOOK = (
    "\nfound = os.statvfs({folder!r}); print(sorted(os.listdir({folder!r})), 4096 * (found.f_blocks - found.f_bfree))"
)
NO_LOOK = "\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=10**12)"


@pytest.mark.parametrize("argv", [[], ["--dtype", "float32", "--verify", "full"]], ids=["copied", "cast"])
def test_a_disk_that_becomes_full(argv, mounting, bases, tmp_path):
    """A real one, of every size from a page up: whatever the write that it refuses."""
    folder = str(tmp_path / "disk")
    run = lambda size, more="": mounting.run(
        *["--model", bases[0], "--plan", "dus:1", "--out", f"{folder}/out", "--max-shard-bytes", SHARD, *argv],
        before=MOUNT.format(folder=folder, options=f"size={size}") + more,
        after=LOOK.format(folder=folder),
    )
    done = run(10_000_000)
    assert (done.code, done.err) == (0, "")
    names, needed = done.out.splitlines()[-1].rsplit(" ", 1)
    assert names == "['out']"
    needed = int(needed)
    assert done.code == run(needed + 4096, NO_LOOK).code == 0
    said = set()
    for size in [*range(4096, needed - 100_000, (needed - 100_000) // 6), *range(needed - 60_000, needed, 12_288)]:
        done = run(size, NO_LOOK)
        message = one_line(done)
        assert message.startswith((f"{folder}/out", f"{folder}/.out.partial-"))
        assert message.endswith(": no space left on the disk")
        said.add(message.split("/")[-1].split(":")[0].split("-")[0])
        assert done.out.splitlines()[-1] == "[] 0"
    assert {"model", "tokenizer.json"} <= said
    message = one_line(run(needed - 150_000))  # and it is said beforehand where that can be
    assert message.startswith(f"{folder}/out needs ")


def test_what_a_killed_run_left_is_removed_before_the_disk_is_found_too_small(mounting, bases, tmp_path):
    """Room for one and a half: a first run, killed, leaves a whole one."""
    folder = str(tmp_path / "disk")
    argv = ["--model", bases[0], "--plan", "dus:1", "--out", f"{folder}/out", "--max-shard-bytes", SHARD]
    upscale(bases[0], tmp_path / "new", "dus:1")
    size = 3 * sum(file.stat().st_size for file in (tmp_path / "new").iterdir()) // 2
    first = textwrap.indent(signalled(signal.SIGKILL, STEPS["verified"]), "    ")
    second = f"    os.wait()\n    print(len(os.listdir({folder!r})), 'left', flush=True)"
    before = MOUNT.format(folder=folder, options=f"size={size}") + f"if os.fork() == 0:\n{first}\nelse:\n{second}"
    done = mounting.run(*argv, before=before, after=LOOK.format(folder=folder))
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1].startswith("['out'] ")
    assert "1 left" in done.out


def test_a_disk_that_cannot_be_written_to(mounting, bases, tmp_path):
    """Mounted for reading, which holds for root too."""
    folder = str(tmp_path / "disk")
    upscale(bases[1], tmp_path / "old", "copy")
    mount = MOUNT.format(folder=folder, options="size=10m") + (
        f"shutil.copytree({str(tmp_path / 'old')!r}, {folder + '/old'!r})\n"
        f"subprocess.run(['mount', '-o', 'remount,ro', {folder!r}], check=True)\n"
    )
    look = f"\nprint(os.listdir({folder!r}), sorted(os.listdir({folder + '/old'!r})))"
    for more in (["--out", f"{folder}/new"], ["--out", f"{folder}/old", "--force"], ["--out", f"{folder}/a/b/new"]):
        done = mounting.run("--model", bases[0], "--plan", "dus:1", *more, before=mount, after=look)
        message = one_line(done)
        assert message.startswith(f"{folder}/")
        assert message.endswith(": Read-only file system")
        assert done.out.splitlines()[-1] == f"['old'] {sorted(os.listdir(tmp_path / 'old'))}"


# ------------------------------------------------------------------------------------------------ a base that changes


def rewrite(path: Path, keep_time: bool) -> None:
    """Every byte of the tensors of layer 2 another one; the size is the same."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    stored = tensorfile.read_safetensors_header(path)
    with open(path, "r+b") as file:
        for name, tensor in stored.items():
            if name.startswith("model.layers.2."):
                file.seek(tensor.offset)
                file.write(bytes(tensor.nbytes))
    os.utime(path, ns=times if keep_time else (times[0], times[1] + 1))


def replace_by(other: Path) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        shutil.copy(other, path.with_name("fresh"))
        os.replace(path.with_name("fresh"), path)

    return replace


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


CHANGES = {
    "grown": grow,
    "shrunk": lambda path: os.truncate(path, path.stat().st_size - 1000),
    "emptied": lambda path: os.truncate(path, 0),
    "replaced": replace_by(SMALL_BASE / "model.safetensors"),
    "replaced by another of its size": lambda path: replace_by(path.parent.parent / "other.safetensors")(path),
    "rewritten": lambda path: rewrite(path, keep_time=False),
    "touched": lambda path: os.utime(path, ns=(0, 1)),
    "removed": lambda path: path.unlink(),
    "removed, and its directory too": lambda path: shutil.rmtree(path.parent),
    "reconfigured": lambda path: grow(path.with_name("config.json")),
}
MOMENTS = {
    "at the first byte": (tensorfile, "write_all", 1),
    "before it is verified": (directory, "write_config", 1),
    "while it is verified": (tensorfile.StoredTensor, "read", 30),
}


def changing(monkeypatch, owner, name: str, nth: int, change: Callable[[], None]) -> None:
    real, calls = getattr(owner, name), []

    def call(*arguments, **more):
        calls.append(name)
        if len(calls) == nth:
            change()
        return real(*arguments, **more)

    for module in (owner, upscaling, merging):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", CHANGES)
def test_a_base_that_changes_while_it_is_read(kind, moment, bases, tmp_path, monkeypatch):
    """One line that names the file. Nothing else would show that half of the output is of another model."""
    shutil.copy(bases[1] / "model.safetensors", tmp_path / "other.safetensors")
    (tmp_path / "there").mkdir()
    how = ({}, {"dtype": "float32"}, {"verify": "full"})[(list(CHANGES).index(kind) + list(MOMENTS).index(moment)) % 3]
    base = shutil.copytree(bases[0], tmp_path / "base")
    changing(monkeypatch, *MOMENTS[moment], lambda: CHANGES[kind](base / "model.safetensors"))
    with pytest.raises(ValueError) as failure:
        upscale(base, tmp_path / "there" / "out", "dus:1", **how)
    file = "config.json" if kind in ("reconfigured", "removed, and its directory too") else "model.safetensors"
    assert str(failure.value).startswith(f"{base / file}: changed while it was read: first ")
    assert "\n" not in str(failure.value)
    assert os.listdir(tmp_path / "there") == []


def test_a_base_that_says_it_has_not_changed(bases, tmp_path, monkeypatch):
    """Other bytes, of the same size and with the same time: what is compared whole shows it."""
    base = shutil.copytree(bases[0], tmp_path / "base")
    changing(monkeypatch, *MOMENTS["before it is verified"], lambda: rewrite(base / "model.safetensors", True))
    with pytest.raises(ValueError, match=r"model\.layers\.2\..* reads back different from what was written"):
        upscale(base, tmp_path / "out", "copy", verify="full")
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", ["shrunk", "replaced by another of its size", "rewritten"])
def test_a_source_that_changes_while_it_is_merged(kind, moment, bases, tmp_path, monkeypatch):
    shutil.copy(bases[0] / "model.safetensors", tmp_path / "other.safetensors")
    source = shutil.copytree(bases[1], tmp_path / "source")
    changing(monkeypatch, *MOMENTS[moment], lambda: CHANGES[kind](source / "model.safetensors"))
    with pytest.raises(ValueError, match=r"source/model\.safetensors: changed while it was read"):
        merge([bases[0], source], tmp_path / "out", "average")
    assert sorted(os.listdir(tmp_path)) == ["other.safetensors", "source"]


def test_the_command_says_so_too(nursery, bases, tmp_path):
    base = shutil.copytree(bases[0], tmp_path / "base")
    (tmp_path / "there").mkdir()
    shrink = f"SIGNAL = 0\nos.kill = lambda *_: os.truncate({str(base / 'model.safetensors')!r}, 20_000)"
    change = f"{AT}\n{shrink}\nat(os, 'copy_file_range', 20)"
    done = nursery.run("--model", base, "--out", tmp_path / "there" / "out", "--plan", "dus:1", before=change)
    assert one_line(done).startswith(f"{base}/model.safetensors: changed while it was read: first ")
    assert os.listdir(tmp_path / "there") == []
