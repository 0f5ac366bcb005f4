"""A `Transformer` from a model directory, or into one. What such a directory is, solar/directory.py says."""

from collections import deque
from dataclasses import replace
from functools import partial
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from solar.cli import publish
from solar.directory import (
    DEFAULT_MAX_SHARD_BYTES,
    CheckpointReader,
    copy_companions,
    dtype_name,
    write_config,
)
from solar.elements import check_fits, fill, map_file, side_by_side, view_in, write_bytes
from solar.model import DecoderLayer, Transformer
from solar.plan import ZEROED_IN_IDENTITY, Plan, from_json, parse_plan, to_json
from solar.tensorfile import TensorToWrite, spans, write_shards

# ------------------------------------------------------------------------------------------------ loading


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """torch's dtype of that name: see `solar.directory.dtype_name`, which also says what is an error."""
    name = dtype_name(dtype)
    return None if name is None else getattr(torch, name)


def choose_device(asked: str) -> str:
    """The device that a --device means, auto being a GPU if there is one. ValueError for one that is not there."""
    device = asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device}: must be auto, cpu, cuda, cuda:N or mps")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # the first sentence of an explanation of some pages
        raise ValueError(f"--device {device}: there is none here ({reason})") from None
    return device


@torch.inference_mode(False)  # a caller's own is his thread's alone, and other threads fill what this one makes
def load_model(
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    plan: str | Plan | None = None,
) -> Transformer:
    """A Transformer with the weights of a model directory: Hugging Face's layout or a Mistral release.

    dtype: None keeps the stored one (that of most parameters where they differ). On the CPU, weights that need no cast
    stay mapped to their files: nothing is read until it is used. All others are read by several threads, in pieces, so
    that nothing stands beside the model but a piece for each: through pinned memory on the way to a GPU.
    plan: up-scale on the way, as text or as a list. Layers that come from the same source are one module and share its
    memory: for running a plan without writing it, not for training it.
    Raises FileNotFoundError, and ValueError with every problem of the directory listed, for a file that changes while
    it is read, or for a value that `dtype` does not hold.
    """
    reader = CheckpointReader(path)
    config, dtype = reader.config, dtype_name(dtype) or reader.dtype
    if plan is not None:
        depth = config.num_hidden_layers
        plan = parse_plan(plan, depth) if isinstance(plan, str) else from_json(to_json(plan), depth)
        config = config.with_depth(depth)  # of the type that the grown model will have
    with torch.device("meta"):
        model = Transformer(config)
    with reader.unchanged():
        model.load_state_dict(_load_tensors(reader, dtype, torch.device(device)), assign=True)
    if plan is not None:
        share_layers(model, plan)
    return model


def _load_tensors(reader: CheckpointReader, dtype: str, device: torch.device) -> dict[str, Tensor]:
    """Every weight by its Hugging Face name: a view of its mapped file, or read in pieces, several at once."""
    tensors, maps, pieces = {}, {}, []
    for name, weight in reader.weights.items():
        stored = weight.stored
        if device.type == "cpu" and stored.dtype == dtype and weight.rotary_heads is None:
            if stored.path not in maps:
                maps[stored.path] = map_file(stored.path)
            tensors[name] = view_in(maps[stored.path], stored)
        else:
            tensors[name] = torch.empty(stored.shape, dtype=getattr(torch, dtype), device=device)
            flat = tensors[name].flatten()
            cuts = spans(len(flat), stored.itemsize)
            pieces += [(name, weight, flat[start:stop], start, stop) for start, stop in cuts]
    if pieces:
        with side_by_side() as run:
            deque(run(fill, pieces), maxlen=0)
    return tensors


def share_layers(model: Transformer, plan: Plan) -> None:
    """Carry out a plan on a model in place, its layers shared between the positions that they come to stand at."""
    base = list(model.model.layers)
    layers = []
    for source in plan:
        layer = base[source.layer]
        if source.init == "identity":
            with torch.device("meta"):
                twin = DecoderLayer(model.config)
            twin.load_state_dict(layer.state_dict(), assign=True)
            for name, parameter in list(twin.named_parameters()):
                if name.rpartition(".")[0] in ZEROED_IN_IDENTITY:
                    owner = twin.get_submodule(name.rpartition(".")[0])
                    setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(torch.zeros_like(parameter)))
            layer = twin
        layers.append(layer)
    model.model.layers = torch.nn.ModuleList(layers)
    model.config = replace(model.config, num_hidden_layers=len(plan))


# ------------------------------------------------------------------------------------------------ saving


def _write(name: str, tensor: Tensor, dtype: torch.dtype, file: FileIO) -> None:
    cast = tensor.detach().to(device="cpu", dtype=dtype)
    check_fits(name, tensor, cast)
    write_bytes(file, cast)


def save_model(
    model: Transformer,
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
    companions: str | Path | dict[str, bytes] | None = None,
) -> Path:
    """Write a model in Hugging Face's layout, whole or not at all; layers that share memory are written separately.

    companions: a directory whose tokenizer files are copied along, or the contents of such files by name.
    Raises FileExistsError if the directory exists and is not empty, unless `force` allows to replace it, and ValueError
    for a value that `dtype` does not hold.
    """
    wanted = dtype_name(dtype)
    state = model.state_dict()
    tensors = []
    for name, shape in model.config.tensor_shapes().items():
        tensor = state[name]
        assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)}, the config says {shape}"
        stored_as = wanted or str(tensor.dtype).removeprefix("torch.")
        tensors.append(TensorToWrite(name, shape, stored_as, partial(_write, name, tensor, getattr(torch, stored_as))))
    with publish(Path(path), force) as staging:
        write_shards(staging, tensors, DEFAULT_MAX_SHARD_BYTES)
        if isinstance(companions, dict):
            for file_name, content in companions.items():
                (staging / file_name).write_bytes(content)
        elif companions is not None:
            copy_companions(Path(companions), staging)
        write_config(staging, replace(model.config, torch_dtype=tensors[0].dtype))
    return Path(path)
