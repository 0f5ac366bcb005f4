"""Model directories: which layout it is, and which tensor is where; what stands beside the weights of a written one.

Three layouts are read. Hugging Face's: `config.json` beside `model.safetensors`, or shards with an index, or the older
`pytorch_model*.bin`. Mistral's releases: `params.json` beside `consolidated.safetensors` or `consolidated.*.pth`. The
first is what is written. Both may lie in one folder, so weights are looked for by the names that the config or the
index implies, never as *.safetensors.

Everything about a directory is checked before the first weight is used, and every problem is reported at once. Nothing
here needs torch.
"""

import contextlib
import errno
import hashlib
import heapq
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from solar.archive import read_torch_archive
from solar.cli import Progress, check_output, clear_leftovers, human_bytes
from solar.config import ModelConfig
from solar.jsonfile import brief, plain, read_json
from solar.tensorfile import StoredTensor, Target, read_safetensors_header

WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
FINGERPRINTED = 512  # elements at each place of a tensor

# Mistral release name -> Hugging Face name; `{}` is the layer. Queries and keys also differ in the order of their rows.
MISTRAL_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
}

# Copied byte for byte beside written weights: tokenizers and generation settings, never re-serialised.
COMPANIONS = [
    "tokenizer.model",
    "tokenizer.model.v*",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
    "LICENSE*",
]

# Rotary frequencies that older writers stored with the weights; they follow from the config.
DERIVED = ("rotary_emb.inv_freq", "rope.freqs")


@dataclass(frozen=True)
class Weight:
    """Where a tensor comes from. `rotary_heads`: that many heads, whose rows stand in the interleaved rotary order."""

    stored: StoredTensor
    rotary_heads: int | None = None

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes of elements start..stop-1 of the flattened tensor as the model wants it, in the stored dtype.

        Rows that turn together are adjacent in a release, and half a head apart in the model.
        """
        if self.rotary_heads is None:
            return self.stored.read(start, stop)
        # The rows of a head are reordered among themselves: whole heads are read, 1 MB each in Mistral-7B.
        head = self.stored.numel // self.rotary_heads
        first, last = start // head, -(-stop // head)
        data = memoryview(self.stored.read(first * head, last * head))
        width, height = self.stored.shape[1] * self.stored.itemsize, self.stored.shape[0] // self.rotary_heads
        rows = [data[at : at + width] for at in range(0, len(data), width)]
        heads = [rows[at : at + height] for at in range(0, len(rows), height)]
        reordered = bytearray().join(row for head in heads for row in head[::2] + head[1::2])
        begin = (start - first * head) * self.stored.itemsize
        return reordered[begin : begin + (stop - start) * self.stored.itemsize]


class CheckpointReader:
    """What is in a model directory, checked, with no weight read yet.

    config: ModelConfig; weights: Hugging Face name -> Weight, for exactly the tensors that the config implies; dtype:
    that of most parameters; files: those that hold the weights; layout: "safetensors", "bin" or "mistral".

    Raises FileNotFoundError for a path that is no model directory, and ValueError listing every other problem.
    """

    def __init__(self, path: str | Path):
        if path == "":  # which Path takes for the current directory
            raise FileNotFoundError(
                "the path of the model is empty; a model is a directory with config.json or params.json"
            )
        self.path = Path(path)
        if not self.path.is_dir():
            what = "is not a directory" if self.path.exists() else "no such directory"
            raise FileNotFoundError(f"{path}: {what}; a model is a directory with config.json or params.json")
        self.layout, index = self._detect()
        config_file = self.path / ("params.json" if self.layout == "mistral" else "config.json")
        raw = read_json(config_file)
        try:
            self.config = ModelConfig.from_mistral(raw) if self.layout == "mistral" else ModelConfig.from_hf(raw)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{config_file}: {error}") from None

        self._fingerprints: dict[bool, str] = {}
        self._problems: list[str] = []
        self._unread = 0  # files; what they hold is not known, so neither is what is missing
        self.files = self._read_index(index) if isinstance(index, Path) else dict.fromkeys(index)
        self._states = {file: _state(self.path / file) for file in (config_file.name, *self.files)}
        stored = self._read_headers()
        self.weights = self._name(stored)
        self._check()
        if self._problems:
            lines = self._problems if len(self._problems) == 1 else ["", *(f"  - {line}" for line in self._problems)]
            raise ValueError(f"{self.path}: " + "\n".join(lines))
        sizes: Counter[str] = Counter()
        for weight in self.weights.values():
            sizes[weight.dtype] += weight.stored.numel
        self.dtype = max(sizes, key=sizes.__getitem__)
        if self.layout == "mistral":  # params.json does not say
            self.config = replace(self.config, torch_dtype=self.dtype)

    def fingerprint(self, whole: bool = False) -> str:
        """16 hexadecimal digits that tell models apart: of the config and of eight places in every tensor, or of every
        byte, which takes as long as reading the files."""
        if whole in self._fingerprints:
            return self._fingerprints[whole]
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name in sorted(self.weights):
            stored = self.weights[name].stored
            digest.update(f"{name} {stored.shape} torch.{stored.dtype}".encode())
            last = max(stored.numel - FINGERPRINTED, 0)
            places = sorted({last * place // 7 for place in range(8)})
            samples = (stored.read(at, min(at + FINGERPRINTED, stored.numel)) for at in places)
            for part in stored.chunks() if whole else samples:
                digest.update(part)
        self._fingerprints[whole] = digest.hexdigest()[:16]
        return self._fingerprints[whole]

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raise ValueError if a file of the model is replaced or written to before the block ends; in place of what
        that may have led to."""
        failure = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
        for file, before in self._states.items():
            if (now := _state(self.path / file)) != before:
                raise ValueError(f"{self.path / file}: changed while it was read: first {before}; then {now}")
        if failure:
            raise failure

    # -------------------------------------------------------------------------------------------- finding

    def _detect(self) -> tuple[str, Path | list[str]]:
        """The layout, and either the index file or the names of the files that hold the weights."""
        here = lambda name: (self.path / name).is_file()
        if here("config.json"):
            for layout, stem in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
                if here(f"{stem}.index.json"):
                    return layout, self.path / f"{stem}.index.json"
                if here(stem):
                    return layout, [stem]
        if here("params.json"):
            if here("consolidated.safetensors"):
                return "mistral", ["consolidated.safetensors"]
            if parts := sorted(file.name for file in self.path.glob("consolidated.*.pth")):
                return "mistral", parts
        if here("config.json") or here("params.json"):
            wanted = "model.safetensors or pytorch_model.bin (or its .index.json), consolidated.safetensors or .*.pth"
            raise FileNotFoundError(f"{self.path}: a config but no weights; looked for {wanted}")
        raise FileNotFoundError(f"{self.path}: no config.json and no params.json: not a model directory")

    def _read_index(self, index: Path) -> dict[str, set[str]]:
        """Shard -> the tensors that the index puts there. A shard is a plain name of a file in the directory."""
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: no weight_map in it")
        shards: dict[str, set[str]] = {}
        for tensor, shard in weight_map.items():
            named = isinstance(shard, str) and shard.isprintable() and len(shard.encode()) < 256
            if not named or shard in ("", ".", "..") or set(shard) & set("/\\"):
                raise ValueError(f"{index}: {plain(tensor)} is put into {brief(shard)}, which is not a plain file name")
            shards.setdefault(shard, set()).add(tensor)
        return shards

    def _read_headers(self) -> dict[str, StoredTensor]:
        stored: dict[str, StoredTensor] = {}
        for file_name, expected in self.files.items():
            path, file_name = self.path / file_name, plain(file_name)
            if not path.is_file():
                self._problems.append(f"{file_name}: named in the index, but there is no such file")
                self._unread += 1
                continue
            try:
                read = read_safetensors_header if path.suffix == ".safetensors" else read_torch_archive
                found = read(path)
            except ValueError as error:
                self._problems.append(str(error).replace(str(path), file_name))
                self._unread += 1
                continue
            if expected is not None and found.keys() != expected:
                self._list("not in", file_name, "though the index says so", expected - found.keys())
                self._list("in", file_name, "but not in the index's entries for it", found.keys() - expected)
            self._list("in", file_name, "and in another file too", found.keys() & stored.keys())
            stored |= found
        return stored

    def _name(self, stored: dict[str, StoredTensor]) -> dict[str, Weight]:
        """Hugging Face name -> weight; a name that is not known stays as it is, to be reported."""
        stored = {name: tensor for name, tensor in stored.items() if not name.endswith(DERIVED)}
        if self.layout != "mistral":
            return {name: Weight(tensor) for name, tensor in stored.items()}
        heads = {"wq": self.config.num_attention_heads, "wk": self.config.num_key_value_heads}
        weights = {}
        for name, tensor in stored.items():
            parts = name.split(".", 5)
            layer = parts[1] if parts[0] == "layers" and len(parts) > 2 and parts[1].isdecimal() else None
            known = MISTRAL_NAMES.get(name if layer is None else ".".join(["layers", "{}", *parts[2:]]))
            rotary_heads = heads.get(parts[-2]) if known and len(parts) > 2 else None
            weights[known.format(layer) if known else f"{name} (not Mistral's)"] = Weight(tensor, rotary_heads)
        return weights

    # -------------------------------------------------------------------------------------------- checking

    def _check(self) -> None:
        """Compare what is there with what the config implies."""
        expected = self.config.tensor_shapes()
        if self.config.tie_word_embeddings and "lm_head.weight" in self.weights:
            head = self.weights.pop("lm_head.weight").stored  # some writers store a tied head; it must say the same
            table = self.weights.get("model.embed_tokens.weight")
            if table is not None and not _same_bytes(head, table.stored):
                self._problems.append(
                    "lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings is true; "
                    "set it to false to use both"
                )
        of_layers = (name.split(".", 3)[2] for name in self.weights if name.startswith("model.layers."))
        found_layers = {layer for layer in of_layers if layer.isdecimal()}
        if not self._unread and found_layers and len(found_layers) != self.config.num_hidden_layers:
            self._problems.append(
                f"num_hidden_layers is {self.config.num_hidden_layers}, but the files hold {len(found_layers)} layers"
            )
        if not self._unread:
            self._list("missing from", "the files", "the config implies them", expected.keys() - self.weights.keys())
        self._list("in", "the files", "unknown to this config", self.weights.keys() - expected.keys())
        for name in (name for name in expected if name in self.weights):
            stored = self.weights[name].stored
            if stored.shape != expected[name]:
                found, implied = brief(list(stored.shape)), list(expected[name])
                where = f"{name} in {plain(stored.path.name)}"
                self._problems.append(f"{where}: shape {found}, the config implies {implied}")
            elif stored.dtype not in WEIGHT_DTYPES:
                kind = f"{name} in {plain(stored.path.name)}: dtype {stored.dtype}"
                self._problems.append(f"{kind}; only bfloat16, float16 and float32 weights are supported")
        if len(self._problems) > 20:
            self._problems[20:] = [f"... and {len(self._problems) - 20} more"]

    def _list(self, relation: str, where: str, comment: str, names: set[str]) -> None:
        """Report tensors by five names and a count."""
        if names:
            first = map(plain, heapq.nsmallest(5, names, key=natural_order))
            shown = ", ".join(first) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
            self._problems.append(f"{relation} {where}, {comment}: {shown}")


def natural_order(name: str) -> list[Any]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, len(part), part) if part.isdecimal() else (1, 0, part) for part in name.split(".", 9)]


def _state(path: Path) -> str:
    """What tells whether a file is still the one it was. (Its inode does not: some network filesystems renumber.)"""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # a name may be none that a filesystem takes
        return getattr(error, "strerror", None) or str(error)
    seconds, rest = divmod(found.st_mtime_ns, 10**9)
    return f"{found.st_size} bytes, modified at {seconds}.{rest:09}"


def _same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(x == y for x, y in zip(a.chunks(), b.chunks(), strict=True))


def dtype_name(dtype: Any) -> str | None:
    """bfloat16, float16 or float32, from that, from bf16, fp16 or fp32, or from torch's; None stays None.

    Raises ValueError for anything else.
    """
    if dtype is None:
        return None
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    name = str(dtype).removeprefix("torch.")
    full = short.get(name, name)
    if full not in WEIGHT_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of bfloat16, float16, float32")
    return full


# ------------------------------------------------------------------------------------------------ from disk to disk


def write_config(directory: Path, config: ModelConfig) -> None:
    (directory / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")


def companions_of(source: Path) -> list[Path]:
    """The tokenizer and generation files of a model directory."""
    return sorted({file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()})


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer and generation files byte for byte; returns their names."""
    files = companions_of(source)
    for file in files:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]


def check_room(readers: list[CheckpointReader], nbytes: int, out: Path, force: bool) -> None:
    """Raise if the output is in the way, would take the place of a model it is made from, or does not fit the disk."""
    where = Path(os.path.realpath(out))  # Path.resolve raises RuntimeError for links in a circle
    for reader in readers:
        base = reader.path
        for place in (base, *(base / name for name in reader.files)):  # a file may be a link to another directory
            if where in (place.resolve(), *place.resolve().parents):
                raise ValueError(
                    f"{out}: the output would replace {place}, which it is made from; give another directory"
                )
        if base.resolve() in where.parents:
            raise ValueError(f"{out}: the output would stand inside the model {base}; give another directory")
    clear_leftovers(out)
    check_output(out, force)
    for companion in companions_of(readers[0].path):
        companion.open("rb").close()  # one that cannot be read is found now, not behind 20 GB of weights
        nbytes += companion.stat().st_size
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise OSError(errno.ENOSPC, "", f"{out} needs {human_bytes(nbytes)}, {human_bytes(free)} are free")


def verify_written(directory: Path, config: ModelConfig, targets: list[Target], whole: bool) -> None:
    """Read a written directory as a loader would, and compare samples, or every byte, with the tensors made again.

    Raises ValueError naming the file and the tensor that differs.
    """
    written = CheckpointReader(directory)
    if written.config != config:
        raise ValueError(f"{directory / 'config.json'}: reads back as {written.config}, expected {config}")
    progress = Progress("verifying", sum(target.nbytes for target in targets) if whole else 1)
    for target in targets:
        stored = written.weights[target.name].stored
        for start, stop in target.spans(whole):
            found = stored.read(start, stop)
            if found != target.make(start, stop):
                raise ValueError(
                    f"{stored.path}: {target.name} reads back different from what was written: a failing disk?"
                )
            if whole:
                progress.advance(len(found))
    if whole:
        progress.close()
