"""Depth up-scaling from disk to disk: `python -m solar.upscale --model DIR --out DIR --plan dus:8`.

A plan moves whole tensors, so most of the work is copying byte ranges from the base's files into new ones, in constant
memory, and without torch unless a cast is asked for. Everything is checked before the first byte is written; the result
is read again before it gets its name.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Literal

from solar import cli
from solar import plan as plans
from solar.config import ModelConfig
from solar.directory import (
    DEFAULT_MAX_SHARD_BYTES,
    CheckpointReader,
    Weight,
    check_room,
    companions_of,
    copy_companions,
    dtype_name,
    verify_written,
    write_config,
)
from solar.tensorfile import BLOCK, ITEMSIZES, StoredTensor, Target, TensorToWrite, write_shards

COPY_BYTES = 1 << 20  # that the kernel copies at once


@dataclass(frozen=True)
class Upscaling:
    """A checked plan: the base, what becomes of it, and every tensor to write, in order.

    copied: where the bytes of a tensor stand that is written as it is stored.
    """

    reader: CheckpointReader
    plan_text: str | None
    plan: plans.Plan
    config: ModelConfig
    targets: list[Target]
    copied: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)

    def describe(self) -> str:
        """The layer table with its seams, and parameters, bytes and config before and after."""
        base, grown, base_dir = self.reader.config, self.config, self.reader.path
        bytes_before = sum(weight.stored.nbytes for weight in self.reader.weights.values())
        changes = []
        for name in ("model_type", "sliding_window", "max_position_embeddings"):
            if (old := getattr(base, name)) != (new := getattr(grown, name)):
                changes.append(f"{name} {old} -> {new}")
        stored = sorted({weight.dtype for weight in self.reader.weights.values()})
        if stored != (written := sorted({target.dtype for target in self.targets})):
            changes.append(f"dtype {', '.join(stored)} -> {', '.join(written)}")
        lines = [
            f"base        {base_dir} ({self.reader.layout}, {self.reader.dtype})",
            f"plan        {self.plan_text or 'a list'}: {base.num_hidden_layers} -> {grown.num_hidden_layers} layers",
            plans.layer_table(self.plan),
            f"new layers  {len(plans.new_layers(self.plan))}, seams {len(plans.seams(self.plan))}",
            f"parameters  {base.num_parameters():,} -> {grown.num_parameters():,}",
            f"bytes       {cli.human_bytes(bytes_before)} -> {cli.human_bytes(self.nbytes)}",
            f"config      {'; '.join(changes) or 'only the depth changes'}",
        ]
        if grown.num_hidden_layers <= base.num_hidden_layers:
            lines.append("note: this plan does not make the model deeper")
        if not any(file.name.startswith(("tokenizer.model", "tokenizer.json")) for file in companions_of(base_dir)):
            lines.append(f"note: {base_dir} has no tokenizer; generating and training need one beside the weights")
        return "\n".join(lines)


def prepare(
    model_dir: str | Path, plan: str | plans.Plan, dtype: str | None = None, model_type: str = "llama"
) -> Upscaling:
    """Check the base and lay out the grown model. Raises as CheckpointReader, parse_plan and dtype_name do; writes
    nothing."""
    reader = CheckpointReader(model_dir)
    depth = reader.config.num_hidden_layers
    text = plan if isinstance(plan, str) else None
    plan = plans.parse_plan(plan, depth) if isinstance(plan, str) else plans.from_json(plans.to_json(plan), depth)
    config = reader.config.with_depth(len(plan), model_type)
    dtype = dtype_name(dtype)
    if dtype is not None:
        config = replace(config, torch_dtype=dtype)
    targets, copied = [], {}
    for name, shape in config.tensor_shapes().items():
        base_name, zero = name, False
        if name.startswith("model.layers."):
            _, _, position, inner = name.split(".", 3)
            source = plan[int(position)]
            base_name = f"model.layers.{source.layer}.{inner}"
            zero = source.init == "identity" and inner.rpartition(".")[0] in plans.ZEROED_IN_IDENTITY
        weight = reader.weights[base_name]
        written_as = dtype or weight.dtype
        make = _zeros(written_as) if zero else _maker(weight, name, written_as)
        targets.append(Target(name, shape, written_as, make))
        if not zero and weight.rotary_heads is None and weight.dtype == written_as:
            copied[name] = weight.stored
    return Upscaling(reader, text, plan, config, targets, copied)


def _maker(weight: Weight, name: str, dtype: str) -> Callable[[int, int], bytearray | memoryview]:
    if weight.dtype == dtype:
        return weight.read
    from solar.elements import cast, elements  # imports torch, which nothing else here needs

    return cast(name, dtype, partial(elements, weight))


def _zeros(dtype: str) -> Callable[[int, int], bytearray]:
    return lambda start, stop: bytearray((stop - start) * ITEMSIZES[dtype])


def upscale(
    model_dir: str | Path,
    out_dir: str | Path,
    plan: str | plans.Plan,
    dtype: str | None = None,
    model_type: str = "llama",
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    verify: Literal["quick", "full"] = "quick",
    force: bool = False,
) -> Path:
    """Grow the model in model_dir by a plan (text of `solar.plan.GRAMMAR`, or a list) and write it to out_dir.

    Bytes are copied as they are stored; only `dtype` (a name, or torch's) asks for a cast. Raises FileNotFoundError or
    ValueError for a base or a plan that is not right, ValueError too for a base that changes meanwhile, FileExistsError
    for an output in the way, OSError for a disk that is full: in every case the output is what it was before.
    """
    upscaling = prepare(model_dir, plan, dtype, model_type)
    carry_out(upscaling, Path(out_dir), max_shard_bytes, verify, force)
    return Path(out_dir)


def carry_out(upscaling: Upscaling, out: Path, max_shard_bytes: int, verify: str, force: bool) -> None:
    """Write, read again, publish."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, found {max_shard_bytes}")
    check_room([upscaling.reader], upscaling.nbytes, out, force)
    with cli.publish(out, force) as staging, upscaling.reader.unchanged(), contextlib.ExitStack() as opened:
        progress = cli.Progress("writing", upscaling.nbytes)
        sources: dict[Path, int] = {}
        for path in {stored.path for stored in upscaling.copied.values()}:
            sources[path] = opened.enter_context(open(path, "rb")).fileno()
        tensors = []
        for target in upscaling.targets:
            stored = upscaling.copied.get(target.name)
            write = _copier(stored, sources, progress.advance) if stored else target.writer(progress.advance)
            copied_from = stored.offset if stored else None
            tensors.append(TensorToWrite(target.name, target.shape, target.dtype, write, copied_from))
        write_shards(staging, tensors, max_shard_bytes)
        progress.close()
        copy_companions(upscaling.reader.path, staging)
        (staging / "upscale.json").write_text(json.dumps(_record(upscaling), indent=1) + "\n", encoding="utf-8")
        write_config(staging, upscaling.config)
        verify_written(staging, upscaling.config, upscaling.targets, whole=verify == "full")


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


def _copier(stored: StoredTensor, sources: dict[Path, int], advance: Callable[[int], None]) -> Callable[[FileIO], None]:
    return lambda file: _copy_range(sources[stored.path], stored.offset, stored.nbytes, file, advance, stored.path)


def _copy_range(source: int, offset: int, count: int, file: FileIO, advance: Callable[[int], None], path: Path) -> None:
    """Append a byte range of an open file, inside the kernel where it can: no byte passes through this process.

    Filesystems that can (XFS, btrfs) do not copy but share whole blocks: what stands before the first goes apart.
    """
    in_kernel = hasattr(os, "copy_file_range")
    while count:
        wanted = min(count, BLOCK - offset % BLOCK if offset % BLOCK else COPY_BYTES)
        if in_kernel:
            try:
                done = os.copy_file_range(source, file.fileno(), wanted, offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                in_kernel = False  # another filesystem, or one that cannot
                continue
        else:
            done = file.write(os.pread(source, wanted, offset))
        if done == 0:
            raise ValueError(f"{path}: became shorter while it was copied: nothing at byte {offset}")
        offset, count = offset + done, count - done
        advance(done)


@dataclass
class Options:
    model: str = cli.flag("solar/assets/base", help="directory of the base model", metavar="DIR")
    out: str = cli.flag("out/solar", help="directory to write", metavar="DIR")
    plan: str = cli.flag("dus", help=plans.GRAMMAR)
    dtype: str | None = cli.flag(None, help="cast to bfloat16, float16 or float32 (default: as stored)")
    model_type: Literal["llama", "keep"] = cli.flag(
        "llama", help="llama: as SOLAR was published, no sliding window; keep: the type and window of the base"
    )
    max_shard_bytes: int = cli.flag(
        DEFAULT_MAX_SHARD_BYTES, help="start another file beyond this size", metavar="SIZE", read=cli.size
    )
    dry_run: bool = cli.flag(False, help="print what would be done and stop")
    verify: Literal["quick", "full"] = cli.flag("quick", help="compare samples of every tensor, or every byte")
    force: bool = cli.flag(False, help="replace the output if it exists")


def main() -> None:
    options = cli.parse(Options, prog="python -m solar.upscale", description="Grow a model in depth.")
    upscaling = prepare(options.model, options.plan, options.dtype, options.model_type)
    out = Path(options.out)
    if not options.dry_run:
        check_room([upscaling.reader], upscaling.nbytes, out, options.force)
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
