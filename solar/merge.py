"""Merging models from disk to disk: `python -m solar.merge --models A B --out DIR --method average --weights 0.4 0.6`.

As SOLAR merges its candidates (arXiv:2312.15166, section 4.3): the weighted average, or spherical linear interpolation.
Each is a function of one tensor, carried out on ranges of its elements, from disk to disk in constant memory.

Layers or tensors may have weights, or a t, of their own, from a file: a list of rules, of which the first that matches
a tensor counts; --weights or --t is for those that no rule matches. `layers` is a half-open range, `tensors` a regular
expression that is searched for in the name; a rule with both means both.

    [{"layers": "0-16", "weights": [0.7, 0.3]}, {"layers": "16-24", "tensors": "self_attn", "weights": [0, 1]}]
"""

import contextlib
import filecmp
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from itertools import groupby, starmap
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from solar import cli
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
from solar.elements import cast, elements, side_by_side
from solar.jsonfile import brief, plain, read_json
from solar.tensorfile import Target, TensorToWrite, spans, write_shards

NEARLY_PARALLEL = 0.9995  # beyond this cosine, of either sign, an angle says too little: interpolation becomes linear
BLOCK = 1 << 16  # elements that are multiplied in fp64 at a time: two such blocks stay in a cache
SMALLEST_NORM = 1e-8  # a tensor that is shorter has no direction to speak of

# What the config of a merged model takes from the first: nothing of it changes what is computed.
FREE = "model_type", "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"
# Which of the files beside the weights say what an id means.
TOKENIZERS = re.compile(r"tokenizer\.model(\.v.*)?|tokenizer\.json|vocab\.json|merges\.txt|added_tokens\.json")

Amount = tuple[float, ...] | float  # a weight for each model, or t


# ------------------------------------------------------------------------------------------------ on one tensor


def normalise(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum. ValueError if one is negative or not a number, or if all are 0."""
    numbers = all(type(weight) in (int, float) and 0 <= weight <= sys.float_info.max for weight in weights)
    if not numbers or not 0 < sum(weights) < math.inf:
        raise ValueError(f"weights must be numbers from 0 up, and not all 0; found {' '.join(map(brief, weights))}")
    return [weight / sum(weights) for weight in weights]


def average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i a_i in fp32, for tensors a_i of one shape, with the weights normalised to sum 1. ValueError as there.

    Computed as a_k - sum_i w_i (a_k - a_i), with a_k the one of the greatest weight, the first of several: tensors that
    are equal come out as they went in, bit for bit, whatever the weights, and so does one that has all the weight.
    """
    weights = normalise(weights)
    chosen = max(range(len(tensors)), key=weights.__getitem__)
    result = middle = tensors[chosen].float()
    for i, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        if i != chosen and weight:
            difference = middle - tensor
            # x - (x - x) keeps the sign of a zero; x + (x - x) would not.
            result = torch.sub(result, difference, alpha=weight, out=difference)
    return result


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Spherical linear interpolation, in fp32, of two tensors of one shape, each taken as one long vector.

    With the angle u between them: (sin((1 - t) u) a + sin(t u) b) / sin(u) (Shoemake, SIGGRAPH 1985). The angle is that
    of the normalised tensors, what is interpolated are the tensors as they are. Linear where they are nearly parallel,
    or opposite. t = 0 gives a, t = 1 gives b, bit for bit. ValueError for a t outside 0..1.
    """
    t = check_t(t)
    flat_a, flat_b = a.flatten(), b.flatten()
    products = dot_products(lambda start, stop: flat_a[start:stop], lambda start, stop: flat_b[start:stop], a.numel())
    return interpolate(a, b, t, slerp_factors(*products, t))


def check_t(t: float) -> float:
    if type(t) not in (int, float) or not 0 <= t <= 1:
        raise ValueError(f"t must be between 0 (the first model) and 1 (the second), found {brief(t)}")
    return t


def dot_products(a: Callable, b: Callable, numel: int, run: Callable = starmap) -> tuple[float, float, float]:
    """(a . a, b . b, a . b) of two flattened tensors, in fp64, from functions that give elements start..stop-1."""

    def products(start: int, stop: int) -> Tensor:
        sums = torch.zeros(3, dtype=torch.float64)
        for x, y in zip(a(start, stop).split(BLOCK), b(start, stop).split(BLOCK), strict=True):
            x, y = x.double(), y.double()
            sums += torch.stack((torch.dot(x, x), torch.dot(y, y), torch.dot(x, y)))
        return sums

    return tuple(sum(run(products, spans(numel, 2)), torch.zeros(3, dtype=torch.float64)).tolist())


def slerp_factors(aa: float, bb: float, ab: float, t: float) -> tuple[float, float] | None:
    """What a and b are multiplied with, from their dot products; None where the interpolation is to be linear."""
    length = lambda square: math.sqrt(square) if math.sqrt(square) > SMALLEST_NORM else 1.0
    cosine = ab / (length(aa) * length(bb))
    if abs(cosine) > NEARLY_PARALLEL:
        return None
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def interpolate(a: Tensor, b: Tensor, t: float, factors: tuple[float, float] | None) -> Tensor:
    """Elements of slerp(a, b, t) from the same elements of both, with the factors of the whole tensors."""
    if factors is None or t in (0, 1):
        return average([a, b], [1 - t, t])
    return (a.float() * factors[0]).add_(b, alpha=factors[1])


# ------------------------------------------------------------------------------------------------ rules


@dataclass(frozen=True)
class Rule:
    """An amount of their own for the tensors of some layers (half-open), or of some names, or both."""

    amount: Amount
    layers: tuple[int, int] | None
    tensors: re.Pattern | None

    def matches(self, name: str) -> bool:
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        in_layers = self.layers is None or self.layers[0] <= layer < self.layers[1]
        return in_layers and (self.tensors is None or self.tensors.search(name) is not None)


def parse_amount(method: str, amount: Any, models: int) -> Amount:
    """Checked weights for `average`, checked t for `slerp`. Raises ValueError."""
    if method == "slerp":
        return check_t(amount)
    if not isinstance(amount, list | tuple) or len(amount) != models:
        raise ValueError(f"weights: one for each of the {models} models is needed, found {brief(amount)}")
    normalise(amount)
    return tuple(amount)


def parse_rules(content: Any, method: str, models: int) -> list[Rule]:
    """Rules from JSON, as the head of this file shows them. ValueError names the rule by its number, from 1."""
    if not isinstance(content, list):
        raise ValueError(f"expected a list of rules, found {type(content).__name__}")
    key = "t" if method == "slerp" else "weights"
    rules = []
    for number, entry in enumerate(content, start=1):
        if not isinstance(entry, dict) or not {key} < entry.keys() <= {key, "layers", "tensors"}:
            raise ValueError(
                f"rule {number}: {key!r} and 'layers' or 'tensors' or both are needed, found {brief(entry)}"
            )
        layers, tensors = entry.get("layers"), entry.get("tensors")
        try:
            if "layers" in entry:
                match = re.fullmatch(r"([0-9]{1,6})-([0-9]{1,6})", layers if isinstance(layers, str) else "")
                if not match or int(match[1]) >= int(match[2]):
                    raise ValueError(f"layers {brief(layers)} is not a half-open range, such as 0-16")
                layers = int(match[1]), int(match[2])
            if "tensors" in entry:
                if not isinstance(tensors, str):
                    raise ValueError(f"tensors {brief(tensors)} is not a regular expression")
                tensors = re.compile(tensors)
            rules.append(Rule(parse_amount(method, entry[key], models), layers, tensors))
        except RecursionError:
            raise ValueError(f"rule {number}: tensors {brief(tensors)} is nested too deeply") from None
        except (ValueError, OverflowError, re.error) as error:
            raise ValueError(f"rule {number}: {error}") from None
    return rules


def assign(rules: list[Rule], names: list[str], otherwise: Amount) -> dict[str, Amount]:
    """The amount of every tensor: that of the first rule that matches. ValueError for a rule that comes to nothing."""
    first = {name: next((i for i, rule in enumerate(rules) if rule.matches(name)), None) for name in names}
    for i, rule in enumerate(rules):
        if i not in first.values():
            why = "rules above match all its tensors" if any(map(rule.matches, names)) else "no tensor matches"
            raise ValueError(f"rule {i + 1}: {why}")
    return {name: otherwise if i is None else rules[i].amount for name, i in first.items()}


# ------------------------------------------------------------------------------------------------ from disk to disk


@dataclass
class Mixture:
    """How one tensor is made from the tensors of the same name, one of each model."""

    name: str
    weights: tuple[Weight, ...]
    method: str
    amount: Amount
    factors: tuple[float, ...] | None = ()  # of slerp, when `measure` has found them

    def measure(self, run: Callable = starmap) -> None:
        """Of `slerp`: a first pass over both tensors."""
        readers = (partial(elements, weight) for weight in self.weights)
        products = dot_products(*readers, self.weights[0].stored.numel, run)
        for weight, square in zip(self.weights, products, strict=False):
            if not math.isfinite(square):
                raise self._not_finite(weight)
        self.factors = slerp_factors(*products, self.amount)

    def make(self, start: int, stop: int) -> Tensor:
        """Elements start..stop-1 of the merged tensor, in fp32. ValueError if they are not finite."""
        parts = [elements(weight, start, stop) for weight in self.weights]
        if self.method == "slerp":
            if self.factors == ():
                self.measure()
            merged = interpolate(*parts, self.amount, self.factors)
        else:
            merged = average(parts, self.amount)
        if not merged.sum().isfinite() and not merged.isfinite().all():  # the first is quick, and nearly always true
            for weight, part in zip(self.weights, parts, strict=True):
                if not part.isfinite().all():
                    raise self._not_finite(weight)
            raise ValueError(f"{self.name}: values too far apart for float32")
        return merged

    def _not_finite(self, weight: Weight) -> ValueError:
        return ValueError(f"{weight.stored.path}: {self.name}: infinite or NaN; a model that is broken is not merged")


@dataclass(frozen=True)
class Merging:
    """A checked merge: the models, and every tensor to write, in order."""

    readers: list[CheckpointReader]
    method: str
    amount: Amount
    rules: list[Any]  # as in JSON
    mixtures: dict[str, Mixture]
    config: ModelConfig
    targets: list[Target]
    notes: list[str]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)

    def describe(self) -> str:
        """The models, which weights or t each layer gets, parameters, bytes, and what stays the first's."""
        lines = [
            f"{'' if i else 'models':<12}{reader.path} ({reader.layout}, {reader.dtype})"
            for i, reader in enumerate(self.readers)
        ]
        lines += [f"method      {self.method}, {_show(self.amount)}" + (" and rules" if self.rules else "")]
        lines += self._table() if self.rules else []
        lines += [f"parameters  {self.config.num_parameters():,}", f"bytes       {cli.human_bytes(self.nbytes)}"]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _table(self) -> list[str]:
        """A line for each run of layers that are made alike; the tensors of a layer apart where they differ."""
        places: dict[int | str, dict[str, Amount]] = {}
        for name, mixture in self.mixtures.items():
            layer, inner = re.fullmatch(r"(model\.)?(layers\.(\d+)\.)?(.*?)(\.weight)?", name).group(3, 4)
            place, inner = (int(layer), inner) if layer else (inner, "")
            places.setdefault(place, {})[inner] = mixture.amount
        lines = []
        for _, group in groupby(places.items(), key=lambda item: (type(item[0]), item[1])):
            run, (amounts, *_) = zip(*group, strict=True)
            label = ", ".join(map(str, run)) if isinstance(run[0], str) else f"layers {run[0]} to {run[-1]}"
            ordered = [amount for amount, _ in Counter(amounts.values()).most_common()][::-1]
            for amount in ordered:
                inner = ", ".join(name for name, value in amounts.items() if value == amount)
                inner = "" if len(ordered) == 1 else "  the rest" if amount == ordered[-1] else f"  {inner}"
                lines.append(f"  {label:<16}  {_show(amount)}{inner}")
                label = ""
        return lines


def _show(amount: Amount) -> str:
    weights = " ".join(f"{weight:.4g}" for weight in normalise(amount)) if isinstance(amount, tuple) else ""
    return f"weights {weights}" if weights else f"t {amount:.4g}"


def _differences(first: CheckpointReader, others: list[CheckpointReader]) -> tuple[list[str], list[str]]:
    """Why models cannot be merged, and what else differs and is taken from the first."""
    problems, notes = [], []
    names = {reader: {file.name for file in companions_of(reader.path)} for reader in (first, *others)}
    for other in others:
        for name, ours in vars(first.config).items():
            if name != "torch_dtype" and ours != (theirs := getattr(other.config, name)):
                where = notes if name in FREE else problems
                where.append(f"{name} is {plain(str(ours))} in {first.path}, {plain(str(theirs))} in {other.path}")
        for name in sorted(names[first] | names[other]):
            where = problems if TOKENIZERS.fullmatch(name) else notes
            if name not in names[first] & names[other]:
                having, lacking = (first, other) if name in names[first] else (other, first)
                where.append(f"{plain(name)} is in {having.path}, but not in {lacking.path}")
            elif not filecmp.cmp(first.path / name, other.path / name, shallow=False):
                where.append(f"{plain(name)} of {first.path} and of {other.path} differ")
        if not any(map(TOKENIZERS.fullmatch, names[first] | names[other])):
            notes.append(f"tokenizers not compared: neither {first.path} nor {other.path} has a file of one")
    return problems, notes


def prepare(
    model_dirs: Sequence[str | Path],
    method: Literal["average", "slerp"],
    weights: Sequence[float] | None = None,
    t: float | None = None,
    dtype: str | torch.dtype | None = None,
    per_layer: str | Path | list | None = None,
) -> Merging:
    """Check the models and lay out the merged one. Raises as `merge` does; writes nothing."""
    if method not in ("average", "slerp"):
        raise ValueError(f"method must be average or slerp, found {method!r}")
    if len(model_dirs) < 2 or (method == "slerp" and len(model_dirs) > 2):
        wanted = "exactly two models" if method == "slerp" else "two or more models"
        raise ValueError(f"{method} takes {wanted}, found {len(model_dirs)}")
    if method == "average" and t is not None:
        raise ValueError(f"--t {t} is for --method slerp, and the method is average, which takes --weights")
    if method == "slerp" and weights is not None:
        shown = " ".join(map(str, weights))
        raise ValueError(f"--weights {shown} is for --method average, and the method is slerp, which takes --t")
    given, default = (t, 0.5) if method == "slerp" else (weights, [1] * len(model_dirs))
    amount = parse_amount(method, default if given is None else given, len(model_dirs))
    dtype = dtype_name(dtype)
    readers = [CheckpointReader(path) for path in model_dirs]
    first = readers[0]
    problems, notes = _differences(first, readers[1:])
    if problems:
        text = problems[0] if len(problems) == 1 else "\n" + "\n".join(f"  - {line}" for line in problems)
        raise ValueError(f"these models cannot be merged: {text}")

    shapes = first.config.tensor_shapes()
    rules, where = per_layer or [], "per_layer"
    if isinstance(rules, str | Path):
        rules, where = read_json(Path(rules)), rules
        if rules == []:
            raise ValueError(f"{where}: no rule in it; leave --per-layer out, or write one")
    try:
        amounts = assign(parse_rules(rules, method, len(readers)), list(shapes), amount)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    config = first.config if dtype is None else replace(first.config, torch_dtype=dtype)
    mixtures, targets = {}, []
    for name, shape in shapes.items():
        mixtures[name] = Mixture(name, tuple(reader.weights[name] for reader in readers), method, amounts[name])
        written_as = dtype or first.weights[name].dtype
        targets.append(Target(name, shape, written_as, cast(name, written_as, mixtures[name].make)))
    return Merging(readers, method, amount, rules, mixtures, config, targets, notes)


def merge(
    model_dirs: Sequence[str | Path],
    out_dir: str | Path,
    method: Literal["average", "slerp"],
    weights: Sequence[float] | None = None,
    t: float | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    verify: Literal["quick", "full"] = "quick",
    force: bool = False,
    per_layer: str | Path | list | None = None,
) -> Path:
    """Merge models of one shape and one tokenizer, and write the result to out_dir, with the first's config and files.

    average: two or more models, `weights` one for each (None: equal). slerp: two models, `t` from 0 to 1 (None: 0.5).
    per_layer: rules as the head of this file shows them, or a file of them. dtype: None keeps the first's. Raises
    FileNotFoundError or ValueError for what is not right, FileExistsError for an output in the way, OSError for a disk
    that is full: in every case the output is what it was before.
    """
    merging = prepare(model_dirs, method, weights, t, dtype, per_layer)
    carry_out(merging, Path(out_dir), max_shard_bytes, verify, force)
    return Path(out_dir)


def carry_out(merging: Merging, out: Path, max_shard_bytes: int, verify: str, force: bool) -> None:
    """Write, read again, publish."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, found {max_shard_bytes}")
    check_room(merging.readers, merging.nbytes, out, force)
    with cli.publish(out, force) as staging, contextlib.ExitStack() as held:
        run = held.enter_context(side_by_side())
        for reader in merging.readers:
            held.enter_context(reader.unchanged())
        progress = cli.Progress("writing", merging.nbytes)

        def write(target: Target, file: FileIO) -> None:
            if merging.method == "slerp":
                merging.mixtures[target.name].measure(run)
            target.writer(progress.advance, run)(file)

        tensors = [TensorToWrite(t.name, t.shape, t.dtype, partial(write, t)) for t in merging.targets]
        write_shards(staging, tensors, max_shard_bytes)
        progress.close()
        copy_companions(merging.readers[0].path, staging)
        (staging / "merge.json").write_text(json.dumps(_record(merging), indent=1) + "\n", encoding="utf-8")
        write_config(staging, merging.config)
        verify_written(staging, merging.config, merging.targets, whole=verify == "full")


def _record(merging: Merging) -> dict:
    """What `merge.json` says: the method, what each model's part was, and what the models were."""
    amount = merging.amount
    return {
        "method": merging.method,
        **({"weights": normalise(amount)} if isinstance(amount, tuple) else {"t": amount}),
        "per_layer": merging.rules,
        "dtype": merging.config.torch_dtype,
        "model_type": merging.config.model_type,
        "sources": [
            {
                "path": str(reader.path),
                "layout": reader.layout,
                "fingerprint": reader.fingerprint(),
                "files": {name: (reader.path / name).stat().st_size for name in reader.files},
            }
            for reader in merging.readers
        ],
    }


@dataclass
class Options:
    models: list[str] = cli.flag(help="directories of the models; the first gives config and tokenizer", metavar="DIR")
    out: str = cli.flag("out/merged", help="directory to write", metavar="DIR")
    method: Literal["average", "slerp"] = cli.flag("average", help="weighted mean, or spherical interpolation of two")
    weights: list[float] | None = cli.flag(None, help="for average: one for each model (default: equal)", metavar="W")
    t: float | None = cli.flag(None, help="for slerp: 0 is the first model, 1 the second (default: 0.5)", metavar="T")
    per_layer: str | None = cli.flag(None, help="rules for layers or tensors, see solar/merge.py", metavar="FILE.json")
    dtype: str | None = cli.flag(None, help="cast to bfloat16, float16 or float32 (default: as the first is stored)")
    max_shard_bytes: int = cli.flag(
        DEFAULT_MAX_SHARD_BYTES, help="start another file beyond this size", metavar="SIZE", read=cli.size
    )
    dry_run: bool = cli.flag(False, help="print what would be done and stop")
    verify: Literal["quick", "full"] = cli.flag("quick", help="compare samples of every tensor, or every byte")
    force: bool = cli.flag(False, help="replace the output if it exists")


def main() -> None:
    options = cli.parse(Options, prog="python -m solar.merge", description="Merge models of one shape.")
    merging = prepare(options.models, options.method, options.weights, options.t, options.dtype, options.per_layer)
    if not options.dry_run:
        check_room(merging.readers, merging.nbytes, Path(options.out), options.force)
    print(merging.describe(), flush=True)
    if options.dry_run:
        print("dry run: nothing written")
        return
    carry_out(merging, Path(options.out), options.max_shard_bytes, options.verify, options.force)
    print("verified   ", "every byte" if options.verify == "full" else "headers, sizes and samples of every tensor")
    print(options.out)


if __name__ == "__main__":
    cli.run(main)
