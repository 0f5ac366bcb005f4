"""Depth up-scaling from disk to disk: `python -m solar.upscale --model DIR --out DIR --plan dus:8`.

A plan moves whole tensors, so most of the work is copying byte ranges from the base's files into new ones, in constant
memory. Everything is checked before the first byte is written; the result is read again before it gets its name.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Literal

import torch

from solar import cli
from solar import plan as plans
from solar.checkpoint import (
    DEFAULT_MAX_SHARD_BYTES,
    CheckpointReader,
    Weight,
    companions_of,
    copy_companions,
    parse_dtype,
    write_config,
)
from solar.config import ModelConfig
from solar.tensorfile import CHUNK_BYTES, TensorToWrite, write_bytes, write_shards

SAMPLE = 2048  # elements at the start, the middle and the end of a tensor that the quick verification compares


@dataclass(frozen=True)
class Target:
    """One tensor of the grown model: a weight of the base, or zeros."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    weight: Weight | None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def elements(self, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop-1 of the flattened tensor, made from the base. ValueError if a cast overflows."""
        if self.weight is None:
            return torch.zeros(stop - start, dtype=self.dtype)
        if self.weight.rotary_heads is None:
            stored = self.weight.stored.read(start, stop)
        else:  # the rows of a head are reordered among themselves: whole heads are read, 1 MB each in Mistral-7B
            head = self.weight.stored.numel // self.weight.rotary_heads
            first, last = start // head, -(-stop // head)
            rows = self.weight.stored.read(first * head, last * head).view(-1, self.shape[1])
            rows = replace(self.weight, rotary_heads=last - first).reorder(rows)
            stored = rows.flatten()[start - first * head : stop - first * head]
        cast = stored.to(self.dtype)
        finite = cast is stored or cast.abs().max().isfinite()  # quick, and nearly always true
        if not finite and bool((cast.isinf() & ~stored.isinf()).any()):
            raise ValueError(
                f"{self.name}: values up to {stored.abs().max():.4g} do not fit {self.dtype}; use bfloat16"
            )
        return cast

    def spans(self, whole: bool) -> Iterator[tuple[int, int]]:
        """Ranges of elements that cover the tensor, or three samples of it."""
        numel = torch.Size(self.shape).numel()
        if whole:
            step = CHUNK_BYTES // self.dtype.itemsize
            yield from ((at, min(at + step, numel)) for at in range(0, numel, step))
        else:
            last = max(numel - SAMPLE, 0)
            yield from ((at, min(at + SAMPLE, numel)) for at in sorted({0, last // 2, last}))


@dataclass(frozen=True)
class Upscaling:
    """A checked plan: the base, what becomes of it, and every tensor to write, in order."""

    reader: CheckpointReader
    plan_text: str | None
    plan: plans.Plan
    config: ModelConfig
    targets: list[Target]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)

    def describe(self) -> str:
        """The layer table with its seams, and parameters, bytes and config before and after."""
        base, grown = self.reader.config, self.config
        bytes_before = sum(weight.stored.nbytes for weight in self.reader.weights.values())
        changes = []
        for name in ("model_type", "sliding_window", "max_position_embeddings"):
            if (old := getattr(base, name)) != (new := getattr(grown, name)):
                changes.append(f"{name} {old} -> {new}")
        lines = [
            f"base        {self.reader.path} ({self.reader.layout}, {str(self.reader.dtype).removeprefix('torch.')})",
            f"plan        {self.plan_text or 'a list'}: {base.num_hidden_layers} -> {grown.num_hidden_layers} layers",
            plans.layer_table(self.plan),
            f"new layers  {len(plans.new_layers(self.plan))}, seams {len(plans.seams(self.plan))}",
            f"parameters  {base.num_parameters():,} -> {grown.num_parameters():,}",
            f"bytes       {cli.human_bytes(bytes_before)} -> {cli.human_bytes(self.nbytes)}",
            f"config      {'; '.join(changes) or 'only the depth changes'}",
        ]
        if grown.num_hidden_layers <= base.num_hidden_layers:
            lines.append("note: this plan does not make the model deeper")
        return "\n".join(lines)


def prepare(
    model_dir: str | Path, plan: str | plans.Plan, dtype: str | torch.dtype | None = None, model_type: str = "llama"
) -> Upscaling:
    """Check the base and lay out the grown model. Raises as CheckpointReader and parse_plan do; writes nothing."""
    reader = CheckpointReader(model_dir)
    depth = reader.config.num_hidden_layers
    text = plan if isinstance(plan, str) else None
    plan = plans.parse_plan(plan, depth) if isinstance(plan, str) else plans.from_json(plans.to_json(plan), depth)
    config = reader.config.with_depth(len(plan), model_type)
    dtype = parse_dtype(dtype)
    if dtype is not None:
        config = replace(config, torch_dtype=str(dtype).removeprefix("torch."))
    targets = []
    for name, shape in config.tensor_shapes().items():
        base_name, zero = name, False
        if name.startswith("model.layers."):
            _, _, position, inner = name.split(".", 3)
            source = plan[int(position)]
            base_name = f"model.layers.{source.layer}.{inner}"
            zero = source.init == "identity" and inner.rpartition(".")[0] in plans.ZEROED_IN_IDENTITY
        weight = reader.weights[base_name]
        targets.append(Target(name, shape, dtype or weight.stored.dtype, None if zero else weight))
    return Upscaling(reader, text, plan, config, targets)


def upscale(
    model_dir: str | Path,
    out_dir: str | Path,
    plan: str | plans.Plan,
    dtype: str | torch.dtype | None = None,
    model_type: str = "llama",
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    verify: Literal["quick", "full"] = "quick",
    force: bool = False,
) -> Path:
    """Grow the model in model_dir by a plan (text of `solar.plan.GRAMMAR`, or a list) and write it to out_dir.

    Bytes are copied as they are stored; only `dtype` asks for a cast. Raises FileNotFoundError or ValueError for a base
    or a plan that is not right, FileExistsError for an output in the way, OSError for a disk that is full: in every
    case the output is what it was before.
    """
    upscaling = prepare(model_dir, plan, dtype, model_type)
    carry_out(upscaling, Path(out_dir), max_shard_bytes, verify, force)
    return Path(out_dir)


def check_room(upscaling: Upscaling, out: Path, force: bool) -> None:
    """Raise if the output is in the way, would take the place of the base, or does not fit the disk."""
    base = upscaling.reader.path
    for place in (base, *(base / name for name in upscaling.reader.files)):  # a file may be a link to another directory
        if out.resolve() in (place.resolve(), *place.resolve().parents):
            raise ValueError(f"{out}: the output would replace {place}, which it is made from; give another directory")
    if base.resolve() in out.resolve().parents:
        raise ValueError(f"{out}: the output would stand inside the base {base}; give another directory")
    cli.check_output(out, force)
    for companion in companions_of(base):
        companion.open("rb").close()  # one that cannot be read is found now, not behind 20 GB of weights
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if upscaling.nbytes > free:
        needed, there = cli.human_bytes(upscaling.nbytes), cli.human_bytes(free)
        raise OSError(errno.ENOSPC, "", f"{out} needs {needed}, {there} are free")


def carry_out(upscaling: Upscaling, out: Path, max_shard_bytes: int, verify: str, force: bool) -> None:
    """Write, read again, publish."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, found {max_shard_bytes}")
    check_room(upscaling, out, force)
    with cli.publish(out, force) as staging, contextlib.ExitStack() as opened:
        progress = cli.Progress("writing", upscaling.nbytes)
        sources: dict[Path, int] = {}
        for path in {target.weight.stored.path for target in upscaling.targets if target.weight}:
            sources[path] = opened.enter_context(open(path, "rb")).fileno()
        tensors = [
            TensorToWrite(target.name, target.shape, target.dtype, _writer(target, sources, progress.advance))
            for target in upscaling.targets
        ]
        write_shards(staging, tensors, max_shard_bytes)
        progress.close()
        copy_companions(upscaling.reader.path, staging)
        (staging / "upscale.json").write_text(json.dumps(_record(upscaling), indent=1) + "\n", encoding="utf-8")
        write_config(staging, upscaling.config)
        _verify(upscaling, staging, whole=verify == "full")


def _record(upscaling: Upscaling) -> dict:
    """What `upscale.json` says: the plan, the new layers, and what the source was."""
    reader, plan = upscaling.reader, upscaling.plan
    config_bytes = json.dumps(asdict(reader.config), sort_keys=True).encode()
    return {
        "plan_text": upscaling.plan_text,
        "plan": plans.to_json(plan),
        "new_layers": plans.new_layers(plan),
        "seams": [{"layer": position, "jump": jump} for position, jump in plans.seams(plan)],
        "num_parameters": upscaling.config.num_parameters(),
        "dtype": upscaling.config.torch_dtype,
        "model_type": upscaling.config.model_type,
        "source": {
            "path": str(reader.path),
            "layout": reader.layout,
            "model_type": reader.config.model_type,
            "num_hidden_layers": reader.config.num_hidden_layers,
            "num_parameters": reader.config.num_parameters(),
            "config_sha256": hashlib.sha256(config_bytes).hexdigest(),
            "files": {name: (reader.path / name).stat().st_size for name in reader.files},
        },
    }


def _writer(target: Target, sources: dict[Path, int], advance: Callable[[int], None]) -> Callable[[FileIO], None]:
    weight = target.weight

    def copy(file: FileIO) -> None:
        _copy_range(sources[weight.stored.path], weight.stored.offset, target.nbytes, file, advance, weight.stored.path)

    def compute(file: FileIO) -> None:
        for start, stop in target.spans(whole=True):
            write_bytes(file, target.elements(start, stop))
            advance((stop - start) * target.dtype.itemsize)

    as_it_is = weight is not None and weight.rotary_heads is None and weight.stored.dtype == target.dtype
    return copy if as_it_is else compute


def _copy_range(source: int, offset: int, count: int, file: FileIO, advance: Callable[[int], None], path: Path) -> None:
    """Append a byte range of an open file, inside the kernel where it can: no byte passes through this process."""
    in_kernel = hasattr(os, "copy_file_range")
    while count:
        if in_kernel:
            try:
                done = os.copy_file_range(source, file.fileno(), min(count, CHUNK_BYTES), offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                in_kernel = False  # another filesystem, or one that cannot
                continue
        else:
            done = file.write(os.pread(source, min(count, CHUNK_BYTES), offset))
        if done == 0:
            raise ValueError(f"{path}: became shorter while it was copied: nothing at byte {offset}")
        offset, count = offset + done, count - done
        advance(done)


def _verify(upscaling: Upscaling, directory: Path, whole: bool) -> None:
    """Read the written directory as a loader would, and compare tensors (samples, or every byte) with the plan."""
    written = CheckpointReader(directory)
    if written.config != upscaling.config:
        raise ValueError(f"{directory / 'config.json'}: reads back as {written.config}, expected {upscaling.config}")
    progress = cli.Progress("verifying", upscaling.nbytes if whole else 1)
    for target in upscaling.targets:
        stored = written.weights[target.name].stored
        for start, stop in target.spans(whole):
            found, expected = stored.read(start, stop), target.elements(start, stop)
            if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
                raise ValueError(
                    f"{stored.path}: {target.name} reads back different from what was written: a failing disk?"
                )
            if whole:
                progress.advance((stop - start) * target.dtype.itemsize)
    if whole:
        progress.close()


@dataclass
class Options:
    model: str = cli.flag("out/base", help="directory of the base model", metavar="DIR")
    out: str = cli.flag("out/solar", help="directory to write", metavar="DIR")
    plan: str = cli.flag("dus", help=plans.GRAMMAR)
    dtype: str | None = cli.flag(None, help="cast to bfloat16, float16 or float32 (default: as stored)")
    model_type: Literal["llama", "keep"] = cli.flag(
        "llama", help="llama: as SOLAR was published, no sliding window; keep: the type and window of the base"
    )
    max_shard_bytes: int = cli.flag(DEFAULT_MAX_SHARD_BYTES, help="start another file beyond this size", metavar="N")
    dry_run: bool = cli.flag(False, help="print what would be done and stop")
    verify: Literal["quick", "full"] = cli.flag("quick", help="compare samples of every tensor, or every byte")
    force: bool = cli.flag(False, help="replace the output if it exists")


def main() -> None:
    options = cli.parse(Options, prog="python -m solar.upscale", description="Grow a model in depth.")
    upscaling = prepare(options.model, options.plan, options.dtype, options.model_type)
    out = Path(options.out)
    if not options.dry_run:
        check_room(upscaling, out, options.force)
    print(upscaling.describe(), flush=True)
    if options.dry_run:
        print("dry run: nothing written")
        return
    carry_out(upscaling, out, options.max_shard_bytes, options.verify, options.force)
    what = "every byte" if options.verify == "full" else "headers, sizes and samples of every tensor"
    print(f"verified    {what}")
    print(out)


if __name__ == "__main__":
    cli.run(main)
