"""Checkpoints of a training run: saved beside the next steps, whole or not at all, and read on any number of ranks.

    OUT/checkpoints/step-00000050/   __0_0.distcp, ...   each rank's part of weights and moments
                                     .metadata           which part of which tensor lies where
                                     config.json, ...    what `export` needs to make a model directory of it
                                     manifest.json       size and SHA-256 of all of these, and the run's own record
    OUT/checkpoints/latest           the name of the newest

The tensors are laid out by PyTorch's distributed checkpoint (DCP), whose planner lets another number of ranks read them
back. DCP itself replaces files in place and flushes no directory, so a checkpoint is staged under a hidden name, and
gets its own in one rename once everything in it is on the disk. `latest` moves only after that, and only then is an
older one removed: whenever the power goes, what `latest` names is whole. A state with a NaN in it is never saved.

`.metadata` is a pickle, and a pickle can run code. It is opened only after its hash has matched, and then by a reader
that makes nothing but DCP's own records. The hash finds damage, not malice: who can write a checkpoint can write its
manifest too. It is the reader that keeps the directory of a stranger from running code.

Export a checkpoint: `python -m solar.snapshot export OUT/checkpoints/step-00000050 DIR`.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from solar import cli
from solar.checkpoint import DEFAULT_MAX_SHARD_BYTES, companions_of, copy_companions, parse_dtype, write_config
from solar.cli import fsync, lock, open_directory
from solar.config import ModelConfig
from solar.optim import local
from solar.tensorfile import TensorToWrite, parse_json, write_bytes, write_shards

FORMAT = 1
PHASES = ("copy", "write", "fsync", "manifest", "rename", "latest", "prune")
NAME = re.compile(r"step-(\d{8,})")
PLAN = "upscale.json"  # of a grown model: which of its layers are new
UNFLATTENED = {"flatten_state_dict": False, "flatten_sharded_tensors": False}  # for DCP: names are names already


def _phase(name: str) -> None:
    """Called on every rank before each step of a save, with the phase that the step belongs to; tests make it fail."""


# ------------------------------------------------------------------------------------------------ saving


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
        _agree(group, "starting on checkpoints", lambda: self._start(companions) if rank == 0 else None)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> None:
        """Copy the state, and return while a thread writes it; waits for the save before this one.

        model: parameters may be DTensors of FSDP2; optimizer: an AdamW over them. Saved are weights and moments by
        their names. The optimizer's options are not: whoever resumes sets them again. record: JSON, handed back by
        `load`. Raises ValueError on every rank for a state that is not finite, and what `wait` raises.
        """
        self.wait()
        content = {"format": FORMAT, "step": step, "record": json.loads(json.dumps(record))}
        state = {name: tensor.detach() for name, tensor in _named_state(model, optimizer).items()}
        try:
            self._together(step, "copy", lambda: self._copy(state))
        except OSError as error:
            self._failure = error
        else:
            self._writer = threading.Thread(target=self._write_and_note_failure, args=(step, state, content))
            self._writer.start()

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
        listed = _agree(self.group, f"looking into {self.root}", lambda: self._in_order() if self.rank == 0 else None)
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
            self.written = self.root / f"step-{step:08}"
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
                ("prune", self._prune),
            ):
                self._together(step, phase, work if self.rank == 0 else lambda: None)

    def _together(self, step: int, phase: str, work: Callable[[], Any]) -> list[Any]:
        def announced():
            _phase(phase)
            return work()

        return _agree(self.group, f"checkpoint of step {step}, {phase}", announced)

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
        (staging / "manifest.json").write_bytes(_seal(content))
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
        for path in [path for path in self._in_order() if _seems_whole(path)][self.keep :]:
            removed = path.rename(path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}"))
            shutil.rmtree(removed)

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
    names = _parameter_names(model)
    state = {f"model.{name}": tensor for tensor, name in names.items()}
    for parameter, values in optimizer.state.items():
        state |= {f"optimizer.{names[parameter]}.{key}": value for key, value in values.items()}
    return state


def _parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Parameter (or buffer) -> its name; the first one, where tied weights have two."""
    names: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return names


def _agree(group: dist.ProcessGroup | None, doing: str, work: Callable[[], Any]) -> list[Any]:
    """What `work` gave on each rank. If it failed on any, the first failure, raised on all: none is left waiting."""
    outcome, failure = None, None
    try:
        outcome = work()
    except Exception as error:
        failure = reason = error
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            reason = error.__context__  # torch.save raises it over the one that says that the disk is full
        kinds = (FileNotFoundError, OSError, ValueError)
        kind = next((kind for kind in kinds if isinstance(reason, kind)), RuntimeError)
        rank = "" if group is None else f" on rank {dist.get_rank(group)}"
        outcome = kind((f"{doing}{rank}: " if doing else "") + (cli.describe(reason) or type(reason).__name__))
    outcomes = [outcome]
    if group is not None:
        outcomes *= dist.get_world_size(group)
        dist.all_gather_object(outcomes, outcome, group=group)
    for other in outcomes:
        if isinstance(other, Exception):
            raise other from failure
    return outcomes


# ------------------------------------------------------------------------------------------------ the manifest


def _seal(content: dict[str, Any]) -> bytes:
    """The text of a manifest, with a hash of the rest of it as its last entry."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=1).encode() + b"\n"


def read_manifest(step_dir: Path) -> dict[str, Any]:
    """The manifest: "step", "record", "files". Its own hash is checked, those of the files are not: see `verify`."""
    path = step_dir / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{step_dir}: no manifest.json: not a checkpoint of this program, or not a whole one")
    data = path.read_bytes()
    content = parse_json(data, path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: format {found!r}, this program reads {FORMAT}")
    content.pop("sha256", None)
    if _seal(content) != data:
        raise ValueError(f"{path}: damaged: its text and the SHA-256 in it disagree")
    if content.keys() != {"format", "step", "record", "files"} or ".metadata" not in content["files"]:
        raise ValueError(f"{path}: sealed, but not as this program does it")
    for name in content["files"]:
        if name in (".", "..") or set(name) & set("/\\\0"):
            raise ValueError(f"{path}: {name!r} is not a plain file name")
    return content


def _seems_whole(step_dir: Path) -> bool:
    """Whether manifest and sizes are right, without reading the files."""
    try:
        _check_sizes(step_dir, read_manifest(step_dir))
    except (ValueError, OSError):
        return False
    return True


def _check_sizes(step_dir: Path, manifest: dict[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        if not (step_dir / name).is_file():
            raise ValueError(f"{step_dir / name}: missing, the manifest has it")
        if (size := (step_dir / name).stat().st_size) != expected["bytes"]:
            raise ValueError(f"{step_dir / name}: {size:,} bytes, the manifest says {expected['bytes']:,}: damaged")


def verify(step_dir: str | Path, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest, and return the record. Nothing is unpickled.

    group: all its ranks call this, each reads its share of the files, and all come to the same result. Raises
    FileNotFoundError for a directory that is no checkpoint, and ValueError naming the file, what was found in it and
    what was expected.
    """
    step_dir = Path(step_dir)

    def compare() -> dict[str, Any]:
        manifest = read_manifest(step_dir)
        _check_sizes(step_dir, manifest)
        share = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        for name in list(manifest["files"])[share[0] :: share[1]]:
            found, expected = cli.file_sha256(step_dir / name), manifest["files"][name]["sha256"]
            if found != expected:
                raise ValueError(f"{step_dir / name}: SHA-256 {found}, the manifest says {expected}: damaged")
        return manifest["record"]

    return _agree(group, "", compare)[0]


# ------------------------------------------------------------------------------------------------ loading


@torch.no_grad()
def load(
    step_dir: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
    verified: bool = False,
) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint, in place, bit for bit, and return the record of the run.

    Each rank reads its own parts, whatever number of ranks wrote them. group: to share the verification, which
    `verified` says `Snapshots.latest` has just done. Raises what `verify` raises, and ValueError if the checkpoint is
    of another model, or of one with other weights frozen.
    """
    step_dir = Path(step_dir)
    if not verified:
        verify(step_dir, group)
    manifest = read_manifest(step_dir)
    metadata = _read_metadata(step_dir, manifest)
    names = _parameter_names(model)
    parameters = {name: tensor for tensor, name in names.items()}
    options = {names[parameter]: options for options in optimizer.param_groups for parameter in options["params"]}
    state = {f"model.{name}": tensor.detach() for name, tensor in parameters.items()}
    _check_same_model(step_dir, metadata, state, trained=options.keys())

    moments: dict[str, dict[str, Tensor]] = {}
    for full_name in metadata.state_dict_metadata.keys() - state.keys():
        name, _, key = full_name.removeprefix("optimizer.").rpartition(".")
        parameter, (shape, dtype) = parameters[name], _shape_and_dtype(metadata, full_name)
        if key == "step":  # torch wants it beside the parameter only where a kernel reads it
            beside = options[name].get("fused") or options[name].get("capturable")
            value = torch.zeros(shape, dtype=dtype, device=local(parameter).device if beside else "cpu")
        elif shape == tuple(parameter.shape):
            value = torch.zeros_like(parameter, dtype=dtype)
        else:
            raise ValueError(f"{step_dir}: {full_name} has another shape than its parameter: {_spell(shape, dtype)}")
        state[full_name] = moments.setdefault(name, {})[key] = value
    _read(step_dir, metadata, state)
    optimizer.state.clear()
    for name, values in moments.items():
        optimizer.state[parameters[name]] = values
    return manifest["record"]


def _check_same_model(step_dir: Path, metadata: Metadata, state: dict[str, Tensor], trained: Set[str]) -> None:
    """ValueError unless the weights in a checkpoint are those of `state`, and its moments belong to what is trained."""
    stored = metadata.state_dict_metadata
    problems = [f"{name} is not in it" for name in state.keys() - stored.keys()]
    for name in stored:
        if name in state:
            found, wanted = _shape_and_dtype(metadata, name), (tuple(state[name].shape), state[name].dtype)
            if found != wanted:
                problems.append(f"{name} is {_spell(*found)} in it, {_spell(*wanted)} in the model")
        elif name.startswith("model."):
            problems.append(f"{name} of it is not in the model")
        elif name.removeprefix("optimizer.").rpartition(".")[0] not in trained:
            problems.append(f"{name} of it belongs to nothing that is trained")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{step_dir} is of another model: {'; '.join(sorted(problems)[:3])}{more}")


def _read(step_dir: Path, metadata: Metadata, state: dict[str, Tensor]) -> None:
    """Fill the tensors, or this rank's parts of them, from whatever parts were stored."""
    reader, planner = FileSystemReader(step_dir), DefaultLoadPlanner(**UNFLATTENED)
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def _shape_and_dtype(metadata: Metadata, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    entry = metadata.state_dict_metadata[name]
    return tuple(entry.size), entry.properties.dtype


def _spell(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def _read_metadata(step_dir: Path, manifest: dict[str, Any]) -> Metadata:
    """DCP's `.metadata`. ValueError if it is not what this module writes: tensors, in files that the manifest lists."""
    try:
        with open(step_dir / ".metadata", "rb") as file:
            metadata = _MetadataReader(file).load()
        entries, places = metadata.state_dict_metadata, metadata.storage_data
        for name, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata) or not name.startswith(("model.", "optimizer.")):
                # Anything else than a tensor, DCP would unpickle.
                raise ValueError(f"{name} is not a tensor of a model or optimizer")
        for place in places.values():
            if place.relative_path not in manifest["files"]:
                raise ValueError(f"{place.relative_path!r} is not in the manifest")
    except Exception as error:  # of whatever kind that bytes from a stranger lead to
        raise ValueError(f"{step_dir / '.metadata'}: not written by this program: {error}") from None
    return metadata


class _MetadataReader(pickle.Unpickler):
    """Takes the pickle `.metadata` for data: makes DCP's records, and the sizes and dtypes in them; nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        records = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        plain = {("torch", "Size"), ("torch.serialization", "_get_layout")}
        if (module, name) in plain or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if module in records and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ in records:
                return found
        raise ValueError(f"it asks for {module}.{name}")


# ------------------------------------------------------------------------------------------------ exporting


def export(step_dir: str | Path, out: str | Path, dtype: str | torch.dtype | None = None, force: bool = False) -> Path:
    """Write a checkpoint's weights as a model directory in Hugging Face's layout, one tensor at a time.

    dtype: None keeps the one that was trained in. Tokenizer files and upscale.json go along. Needs no process group.
    Raises what `verify` raises, FileExistsError as `save_model` does, ValueError for a value that dtype cannot hold.
    """
    step_dir, dtype = Path(step_dir), parse_dtype(dtype)
    cli.check_output(Path(out), force)
    verify(step_dir)
    metadata = _read_metadata(step_dir, read_manifest(step_dir))
    config = ModelConfig.from_hf(parse_json((step_dir / "config.json").read_bytes(), step_dir / "config.json"))
    tensors = []
    for name, shape in config.tensor_shapes().items():
        if f"model.{name}" not in metadata.state_dict_metadata:
            raise ValueError(f"{step_dir}: {name} is missing, its config.json implies it")
        found, stored = _shape_and_dtype(metadata, f"model.{name}")
        if found != shape:
            raise ValueError(f"{step_dir}: {name} is {list(found)}, its config.json says {list(shape)}")

        def write(file, name=name, shape=shape, stored=stored) -> None:
            tensor = torch.empty(shape, dtype=stored)
            _read(step_dir, metadata, {f"model.{name}": tensor})
            cast = tensor.to(dtype or stored)
            if not cast.isfinite().all():
                raise ValueError(f"{name}: values up to {tensor.abs().max():.4g} do not fit {dtype}; use bfloat16")
            write_bytes(file, cast)

        tensors.append(TensorToWrite(name, shape, dtype or stored, write))
    with cli.publish(Path(out), force) as staging:
        write_shards(staging, tensors, DEFAULT_MAX_SHARD_BYTES)
        copy_companions(step_dir, staging)
        if (step_dir / PLAN).is_file():
            shutil.copyfile(step_dir / PLAN, staging / PLAN)
        write_config(staging, replace(config, torch_dtype=str(tensors[0].dtype).removeprefix("torch.")))
    return Path(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m solar.snapshot", description="Make a model of a checkpoint.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("step_dir", metavar="STEP_DIR", help="the checkpoint: OUT/checkpoints/step-...")
    parser.add_argument("out", metavar="DIR", help="model directory to write")
    parser.add_argument("--dtype", help="cast to bfloat16, float16 or float32 (default: as trained)")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    options = parser.parse_args()
    print(export(options.step_dir, options.out, options.dtype, options.force))


if __name__ == "__main__":
    cli.run(main)
