"""Manifests: every damage is found, by name, and the directory of a stranger runs nothing."""

import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from solar import cli, manifest
from solar.manifest import read_manifest, read_metadata, seal, verify
from solar.restore import export, load
from tests.saving import alone, build, flip, save

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_flipped_bit_is_found_before_anything_is_unpickled(root, monkeypatch):
    save(alone(root), 1)
    path, toy, rng = root / "step-00000001", build(), random.Random(0)
    monkeypatch.setattr(manifest, "_MetadataReader", None)
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
        (tmp_path / "manifest.json").write_bytes(seal({"format": 1, "step": 1, "record": {}, "files": files}))
        with pytest.raises(ValueError):
            verify(tmp_path)


# ------------------------------------------------------------------------------------------------ of a stranger


class Malice:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def reseal(path: Path, metadata: bytes) -> None:
    """Another `.metadata`, and a manifest that agrees with it: what a stranger can do."""
    (path / ".metadata").write_bytes(metadata)
    content = json.loads((path / "manifest.json").read_text())
    del content["sha256"]
    content["files"][".metadata"] = {"bytes": len(metadata), "sha256": cli.file_sha256(path / ".metadata")}
    (path / "manifest.json").write_bytes(seal(content))


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
    metadata = read_metadata(path, read_manifest(path))
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    reseal(path, pickle.dumps(metadata))
    with pytest.raises(ValueError, match="elsewhere' is not in the manifest"):
        load(path, *build())
    metadata.state_dict_metadata["model.one.bias"] = BytesStorageMetadata()  # DCP would unpickle what lies there
    reseal(path, pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"model\.one\.bias is not a tensor"):
        load(path, *build())
