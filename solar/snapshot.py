"""Checkpoints of a training run: saved beside the next steps, whole or not at all.

    OUT/checkpoints/step-00000050/   __0_0.distcp, ...   each rank's part of weights and moments
                                     .metadata           which part of which tensor lies where
                                     config.json, ...    what an export needs to make a model directory of it
                                     manifest.json       size and SHA-256 of all of these, and the run's own record
    OUT/checkpoints/latest           the name of the newest

The tensors are laid out by PyTorch's distributed checkpoint (DCP), whose planner lets another number of ranks read them
back. DCP itself replaces files in place and flushes no directory, so a checkpoint is staged under a hidden name, and
gets its own in one rename once everything in it is on the disk. `latest` moves only after that, and only then is an
older one removed: whenever the power goes, what `latest` names is whole. A state with a NaN in it is never saved.

solar/manifest.py finds what is damaged, solar/restore.py reads what is whole.

Export a checkpoint: `python -m solar.snapshot export OUT/checkpoints/step-00000050 DIR`.
"""

import argparse
import contextlib
import json
import math
import os
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from solar import cli, restore
from solar.agree import agree
from solar.cli import fsync, lock, open_directory
from solar.config import ModelConfig
from solar.directory import companions_of, write_config
from solar.manifest import FORMAT, seal, seems_whole, verify
from solar.optim import local
from solar.restore import PLAN, UNFLATTENED, parameter_names

PHASES = ("copy", "write", "fsync", "manifest", "rename", "latest", "prune")
NAME = re.compile(r"step-(\d{8,})")


def _phase(name: str) -> None:
    """Called on every rank before each step of a save, with the phase that the step belongs to; tests make it fail."""


class Snapshots:
    """The checkpoints of one run, in `root`; every rank makes one, and all of them call each method together.

    keep: how many to keep. group: a gloo process group of all ranks that nothing else uses, since a background thread
    does, or None for a single process. config, companions: of the model, and the directory with its tokenizer files
    (and upscale.json), read now. on_error: whether a save that the disk refuses ends the run.

    A checkpoint of the same step that exists already, as after a resume from an older one, is replaced: it stands aside
    until the new one is in place. Raises OSError where `root` cannot be made, ValueError for keep < 1.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None,
        config: ModelConfig,
        companions: Path | None,
        on_error: Literal["continue", "stop"],
    ):
        if keep < 1:
            raise ValueError(f"{keep} checkpoints to keep: it takes at least 1 to go on from")
        assert group is not None or world_size == 1, "several ranks need a group to agree over"
        self.root, self.keep, self.rank, self.group = Path(root), keep, rank, group
        self.config, self.on_error = config, on_error
        self._files: dict[str, bytes] = {}  # to be exported with the weights
        self._copies: dict[str, Tensor] = {}  # of this rank's part of the state, in the CPU's memory
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None
        self.written: Path | None = None  # the last checkpoint that this run has written, once it stands
        agree(group, "starting on checkpoints", lambda: self._start(companions) if rank == 0 else None)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> None:
        """Copy the state, and return while a thread writes it; waits for the save before this one.

        model: parameters may be DTensors of FSDP2; optimizer: an AdamW over them. Saved are weights and moments by
        their names. The optimizer's options are not: whoever resumes sets them again. record: JSON, handed back by
        `restore.load`. Raises ValueError on every rank for a state that is not finite, and what `wait` raises, but
        then only when this state has been saved, if that is possible by now.
        """
        refused = None
        try:
            self.wait()
        except OSError as error:
            refused = error
        content = {"format": FORMAT, "step": step, "record": json.loads(json.dumps(record))}
        state = {name: tensor.detach() for name, tensor in _named_state(model, optimizer).items()}
        try:
            self._together(step, "copy", lambda: self._copy(state))
        except OSError as error:
            self._failure = error
        else:
            self._writer = threading.Thread(target=self._write_and_note_failure, args=(step, state, content))
            self._writer.start()
        if refused:
            if self._writer:
                self._writer.join()
            raise refused

    def wait(self) -> None:
        """Return once the last save has come to its end. If the disk refused it: raise OSError, or say so and go on."""
        if self._writer is not None:
            self._writer.join()
        self._writer, failure, self._failure = None, self._failure, None
        if failure is None:
            return
        if self.on_error == "stop" or not isinstance(failure, OSError):
            raise failure
        if self.rank == 0:
            print(f"note: {failure}; going on without it", file=sys.stderr)

    close = wait  # for contextlib.closing: the end of a run, too, waits for its last save

    def latest(self) -> Path | None:
        """The checkpoint to go on from: what `latest` names or, if that is damaged, the next older that is not.

        One line on stderr says what was passed over and why. None if there is none, or none that is whole.
        """
        if self._writer is not None:
            self._writer.join()
        passed_over = []
        listed = agree(self.group, f"looking into {self.root}", lambda: self._in_order() if self.rank == 0 else None)
        for path in listed[0]:
            try:
                verify(path, self.group)
            except (ValueError, OSError) as error:
                passed_over.append(str(error))
                continue
            break
        else:
            path = None
        if passed_over and self.rank == 0:
            found = f"going on from {path.name}" if path else "no other is left"
            print(f"note: passed over {'; '.join(passed_over)}; {found}", file=sys.stderr)
        return path

    # -------------------------------------------------------------------------------------------- one save

    def _write_and_note_failure(self, step: int, state: dict[str, Tensor], content: dict[str, Any]) -> None:
        try:
            self._write(step, state, content)
        except Exception as error:
            self._failure = error  # for `wait`

    def _write(self, step: int, state: dict[str, Tensor], content: dict[str, Any]) -> None:
        """Everything after the copy: in this order, and each step on all ranks before the next on any."""
        final = self.root / f"step-{step:08}"
        with contextlib.ExitStack() as undo:  # rank 0 makes the directory, and removes what is left of it
            stage = lambda: undo.enter_context(self._staging(final)) if self.rank == 0 else None
            staging: Path = self._together(step, "write", stage)[0]

            planner, writer = _CopiesPlanner(self._copies), FileSystemWriter(staging, 1, sync_files=False)
            writer.per_thread_copy_ahead = 0  # it would copy from a GPU meanwhile, but everything is on the CPU
            writer.storage_meta = lambda: None  # a random number and this machine's path, else part of the checkpoint
            plans = self._together(step, "write", lambda: self._plan(planner, writer, state, staging))
            plans, metadata = planner.create_global_plan(plans)  # the same on each rank
            plan = planner.finish_plan(writer.prepare_global_plan(plans)[self.rank])
            written = self._together(step, "write", lambda: writer.write_data(plan, planner).value())
            finish = lambda: self._finish(writer, metadata, written, staging) if self.rank == 0 else None
            self._together(step, "write", finish)

            hashed = self._together(step, "fsync", lambda: self._settle(staging))
            content["files"] = {name: entry for files in hashed for name, entry in sorted(files.items())}
            for phase, work in (
                ("manifest", lambda: self._write_manifest(staging, content)),
                ("rename", lambda: self._rename(staging, final)),
                ("latest", lambda: self._move_latest(final)),
            ):
                self._together(step, phase, work if self.rank == 0 else lambda: None)
            self.written = final
            self._together(step, "prune", self._prune if self.rank == 0 else lambda: None)

    def _together(self, step: int, phase: str, work: Callable[[], Any]) -> list[Any]:
        def announced():
            _phase(phase)
            return work()

        return agree(self.group, f"checkpoint of step {step}, {phase}", announced)

    def _copy(self, state: dict[str, Tensor]) -> None:
        """This rank's part of everything into memory that the next steps do not touch, after a look at each value."""
        parts = {name: local(tensor) for name, tensor in state.items()}
        looked_at = [name for name, part in parts.items() if part.is_floating_point() and part.numel()]
        largest = torch._foreach_norm([parts[name] for name in looked_at], math.inf)
        finite = torch.stack([value.double().cpu() for value in largest]).isfinite() if largest else torch.ones(0)
        if not finite.all():
            bad = [name for name, good in zip(looked_at, finite.tolist(), strict=True) if not good]
            more = f", nor are {len(bad) - 1} others" if len(bad) > 1 else ""
            raise ValueError(f"{bad[0]} is not finite{more}: nothing is saved")
        self._copies = {name: self._copies[name] for name in parts.keys() & self._copies.keys()}
        for name, part in parts.items():
            copy = self._copies.get(name)
            if copy is None or (copy.shape, copy.dtype) != (part.shape, part.dtype):
                copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                self._copies[name] = copy
            copy.copy_(part, non_blocking=True)
        if any(part.is_cuda for part in parts.values()):
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def _staging(self, final: Path) -> Iterator[Path]:
        """A fresh hidden directory, locked for as long as this process lives, so that no other takes it for dead."""
        with open_directory(self.root) as root:
            lock(root, wait=True)
            staging = self.root / f".{final.name}.partial-{secrets.token_hex(4)}"
            staging.mkdir()
            alive = os.open(staging, os.O_RDONLY)
            lock(alive)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(alive)

    def _plan(self, planner: "_CopiesPlanner", writer: FileSystemWriter, state: dict[str, Tensor], staging: Path):
        """What this rank would write: its parts, and a copy of what all ranks have, which one of them will write."""
        if not staging.is_dir():  # DCP would make it
            raise OSError(f"{self.root} is not the same directory here as on rank 0: use a file system that all share")
        planner.set_up_planner(state, is_coordinator=self.rank == 0)
        writer.set_up_storage_writer(self.rank == 0, rank=self.rank, use_collectives=True)
        return writer.prepare_local_plan(planner.create_local_plan())

    def _finish(self, writer: FileSystemWriter, metadata: Metadata, written: list, staging: Path) -> None:
        writer.finish(metadata, written)
        write_config(staging, self.config)
        for name, data in self._files.items():
            (staging / name).write_bytes(data)

    def _settle(self, staging: Path) -> dict[str, dict[str, Any]]:
        """Flush the files that this rank wrote to the disk, and say what is in them."""
        own = lambda name: name.startswith(f"__{self.rank}_") or (self.rank == 0 and not name.startswith("__"))
        files = [path for path in staging.iterdir() if own(path.name)]
        for path in files:
            fsync(path)
        return {path.name: {"bytes": path.stat().st_size, "sha256": cli.file_sha256(path)} for path in files}

    def _write_manifest(self, staging: Path, content: dict[str, Any]) -> None:
        (staging / "manifest.json").write_bytes(seal(content))
        fsync(staging / "manifest.json")
        fsync(staging)

    def _rename(self, staging: Path, final: Path) -> None:
        """The moment at which a checkpoint comes into being. One of the same step stands aside; see `_start`."""
        aside = self.root / f".{final.name}.replaced"
        with open_directory(self.root) as root:
            lock(root, wait=True)
            if replaces := final.exists():
                final.rename(aside)
            try:
                staging.rename(final)
            except BaseException:
                if replaces:
                    aside.rename(final)
                raise
            os.fsync(root)
        if replaces:
            shutil.rmtree(aside, ignore_errors=True)

    def _move_latest(self, final: Path) -> None:
        fresh = self.root / ".latest.partial"
        fresh.write_text(final.name + "\n")
        fsync(fresh)
        fresh.rename(self.root / "latest")
        fsync(self.root)

    def _prune(self) -> None:
        """Remove all but the first `keep` whole ones. The one that `latest` names is the first of them."""
        for path in [path for path in self._in_order() if seems_whole(path)][self.keep :]:
            removed = path.rename(path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}"))
            shutil.rmtree(removed, ignore_errors=True)  # `_start` tries again

    # -------------------------------------------------------------------------------------------- the directory

    def _start(self, companions: Path | None) -> None:
        """Make the directory, and clear away what a run that was killed has left in it."""
        files = [*companions_of(companions), companions / PLAN] if companions is not None else []
        self._files = {path.name: path.read_bytes() for path in files if path.is_file()}
        self.root.mkdir(parents=True, exist_ok=True)
        fsync(self.root.parent)
        with open_directory(self.root) as root:
            locked = lock(root, wait=True)  # without locks, as on some NFS, nothing says that another run is dead
            for aside in self.root.glob(".step-*.replaced"):
                final = self.root / aside.name.removeprefix(".").removesuffix(".replaced")
                if not final.exists():
                    aside.rename(final)  # killed between the two renames
                elif locked:
                    shutil.rmtree(aside, ignore_errors=True)
            for stale in self.root.glob(".step-*.partial-*") if locked else ():
                with contextlib.suppress(OSError), open_directory(stale) as found:
                    if lock(found):
                        shutil.rmtree(stale)

    def _in_order(self) -> list[Path]:
        """All checkpoints: what `latest` names, then those before it from the newest down, then those beyond it.

        (Beyond it lies what an earlier run left that this one has gone back behind: the last to be chosen, and the
        first to be removed.)
        """
        steps = {int(match[1]): path for path in self.root.iterdir() if (match := NAME.fullmatch(path.name))}
        try:
            match = NAME.fullmatch((self.root / "latest").read_text().strip())
        except (OSError, UnicodeDecodeError):
            match = None
        named = int(match[1]) if match else max(steps, default=0)
        return [steps[step] for step in sorted(steps, key=lambda step: (step > named, -step))]


class _CopiesPlanner(DefaultSavePlanner):
    """Plans by the layout of the live tensors, which does not change; writes the copies, which do not either."""

    def __init__(self, copies: dict[str, Tensor]):
        super().__init__(**UNFLATTENED)
        self.copies = copies

    def resolve_data(self, write_item) -> Tensor:
        return self.copies[write_item.index.fqn]


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a training state by name: `model.NAME`, and `optimizer.NAME.KEY` for what AdamW has of NAME.

    Goes by `state_dict`, since FSDP shows whole parameters instead of its own after a forward pass, until asked so.
    """
    names = parameter_names(model)
    state = {f"model.{name}": tensor for tensor, name in names.items()}
    for parameter, values in optimizer.state.items():
        state |= {f"optimizer.{names[parameter]}.{key}": value for key, value in values.items()}
    return state


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m solar.snapshot", description="Make a model of a checkpoint.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("step_dir", metavar="STEP_DIR", help="the checkpoint: OUT/checkpoints/step-...")
    parser.add_argument("out", metavar="DIR", help="model directory to write")
    parser.add_argument("--dtype", help="cast to bfloat16, float16 or float32 (default: as trained)")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    options = parser.parse_args()
    print(restore.export(options.step_dir, options.out, options.dtype, options.force))


if __name__ == "__main__":
    cli.run(main)
