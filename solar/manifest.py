"""What a training checkpoint says is in it: a sealed list of its files, and DCP's list of its tensors.

manifest.json holds the size and SHA-256 of each file, the run's own record, and a hash of itself. `.metadata` is a
pickle, and a pickle can run code. It is opened only after its hash has matched, and then by a reader that makes nothing
but DCP's own records. The hash finds damage, not malice: who can write a checkpoint can write its manifest too. It is
the reader that keeps the directory of a stranger from running code.
"""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from solar import cli
from solar.agree import agree
from solar.jsonfile import parse_json

FORMAT = 1


def seal(content: dict[str, Any]) -> bytes:
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
    if seal(content) != data:
        raise ValueError(f"{path}: damaged: its text and the SHA-256 in it disagree")
    if content.keys() != {"format", "step", "record", "files"} or ".metadata" not in content["files"]:
        raise ValueError(f"{path}: sealed, but not as this program does it")
    for name in content["files"]:
        if name in (".", "..") or set(name) & set("/\\\0"):
            raise ValueError(f"{path}: {name!r} is not a plain file name")
    return content


def seems_whole(step_dir: Path) -> bool:
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

    return agree(group, "", compare)[0]


# ------------------------------------------------------------------------------------------------ .metadata


def read_metadata(step_dir: Path, manifest: dict[str, Any]) -> Metadata:
    """DCP's `.metadata`. ValueError if it is not what this program writes: tensors, in files the manifest lists."""
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
