"""What an up-scaling does to the layers, as data.

A plan is a list of sources, one for each layer of the grown model: which layer of the base stands there, and whether it
is an exact copy or starts as the identity. Everything else (streaming from disk to disk, building the model in memory,
training only what is new) reads this list. Carried out on modules, for the reader, it is three lines:

    layers = torch.nn.ModuleList(copy.deepcopy(base.layers[source.layer]) for source in plan)
    for layer in (layer for layer, source in zip(layers, plan) if source.init == "identity"):
        layer.self_attn.o_proj.weight.data.zero_(), layer.mlp.down_proj.weight.data.zero_()

In the papers' letters, which stand only in this file: n layers in the base, m dropped at each side.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from solar.jsonfile import brief, read_json

GRAMMAR = "dus[:M], idus:M:G, stack, expand[:GROUPS[:TOP]], slices:A-B,C-D,..., copy, or a FILE.json"

# A residual block whose two output projections are zero adds nothing to the stream: the layer is the identity, and
# still learns, since their gradient is not zero. (Zeroing the norms instead would leave no gradient at all:
# arXiv:2401.02415.)
ZEROED_IN_IDENTITY = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Source:
    """Where one layer of the grown model comes from."""

    layer: int
    init: Literal["copy", "identity"] = "copy"


Plan = list[Source]


def interlock(n: int, m: int, group: int) -> Plan:
    """Two copies of the base, A = layers 0..n-m-1 and B = m..n-1, taken alternately `group` layers at a time.

    group = n - m is depth up-scaling (DUS, arXiv:2312.15166, section 2): A, then B; 2(n - m) layers. m = 0 with
    group = n stacks the whole base twice. A smaller group is interlocked DUS (iDUS); when it does not divide n - m the
    last group is short. Raises ValueError unless 0 <= m < n and group >= 1.
    """
    if not 0 <= m < n:
        raise ValueError(f"M = {m} does not fit a model of {n} layers: it must be between 0 and {n - 1}")
    if group < 1:
        raise ValueError(f"G = {group} must be at least 1")
    lower, upper = range(0, n - m), range(m, n)
    return [Source(i) for at in range(0, n - m, group) for half in (lower, upper) for i in half[at : at + group]]


def expand(n: int, groups: int, top: int = 1) -> Plan:
    """Block expansion of LLaMA Pro (arXiv:2401.02415, section 3.2): the base in `groups` equal groups, each followed by
    identity copies of its `top` last layers. The result computes exactly what the base computes.

    Raises ValueError unless `groups` divides n and 1 <= top <= n / groups.
    """
    if groups < 1 or n % groups:
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        raise ValueError(f"GROUPS = {groups} does not divide {n} layers evenly; what does: {divisors}")
    size = n // groups
    if not 1 <= top <= size:
        raise ValueError(f"TOP = {top} must be between 1 and the {size} layers of a group")
    plan = []
    for start in range(0, n, size):
        plan += [Source(i) for i in range(start, start + size)]
        plan += [Source(i, "identity") for i in range(start + size - top, start + size)]
    return plan


def slices(n: int, ranges: list[tuple[int, int]]) -> Plan:
    """Half-open ranges of the base's layers, one after the other. ValueError for a range outside 0..n, or empty."""
    for start, stop in ranges:
        if not 0 <= start < stop <= n:
            raise ValueError(f"the range {start}-{stop} does not fit a model of {n} layers (half-open, 0-{n} is all)")
    return [Source(i) for start, stop in ranges for i in range(start, stop)]


def parse_plan(text: str, n: int) -> Plan:
    """A plan for a base of n layers from its text (see GRAMMAR) or JSON file. Raises ValueError, FileNotFoundError."""
    if text.endswith(".json"):
        return _read_plan(Path(text), n)
    kind, *arguments = text.split(":")
    if kind == "slices" and len(arguments) == 1:
        return slices(n, [_parse_range(part) for part in arguments[0].split(",")])
    # Not all that int() takes: it knows spaces and the digits of every script.
    if not all(re.fullmatch(r"-?[0-9]{1,9}", argument) for argument in arguments):
        raise _misspelt(text)
    numbers = [int(argument) for argument in arguments]
    match kind, numbers:
        case "dus", []:
            return interlock(n, n // 4, n - n // 4)
        case "dus", [m]:
            return interlock(n, m, max(n - m, 1))
        case "idus", [m, group]:
            return interlock(n, m, group)
        case "stack", []:
            return interlock(n, 0, n)
        case "expand", []:
            return expand(n, max(d for d in range(1, max(n // 4, 1) + 1) if n % d == 0))
        case "expand", [groups]:
            return expand(n, groups)
        case "expand", [groups, top]:
            return expand(n, groups, top)
        case "copy", []:
            return slices(n, [(0, n)])
    raise _misspelt(text)


def _misspelt(text: str) -> ValueError:
    return ValueError(f"plan {text!r} is not one of: {GRAMMAR}")


def _parse_range(part: str) -> tuple[int, int]:
    start, _, stop = part.partition("-")
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*-\s*[0-9]{1,9}\s*", part):
        raise ValueError(f"plan slices: {part!r} is not a half-open range of layers, such as 0-24")
    return int(start), int(stop)


def to_json(plan: Plan) -> list[dict[str, Any]]:
    return [asdict(source) for source in plan]


def from_json(values: Any, n: int) -> Plan:
    """The inverse of `to_json`, checked against a base of n layers. ValueError names the entry that is wrong."""
    if not isinstance(values, list) or not values:
        raise ValueError("a plan in JSON is a non-empty list, one entry for each layer of the grown model")
    plan = []
    for position, entry in enumerate(values):
        if not isinstance(entry, dict) or not {"layer"} <= set(entry) <= {"layer", "init"}:
            raise ValueError(
                f'plan entry {position} must be {{"layer": N, "init": "copy" or "identity"}}, found {brief(entry)}'
            )
        layer, init = entry["layer"], entry.get("init", "copy")
        if type(layer) is not int or not 0 <= layer < n:
            raise ValueError(f"plan entry {position} names layer {brief(layer)}; the model has layers 0 to {n - 1}")
        if init not in ("copy", "identity"):
            raise ValueError(f"plan entry {position}: init must be copy or identity, found {brief(init)}")
        plan.append(Source(layer, init))
    return plan


def _read_plan(path: Path, n: int) -> Plan:
    """A list as `to_json` makes it, or a whole `upscale.json`."""
    values = read_json(path)
    try:
        return from_json(values.get("plan") if isinstance(values, dict) else values, n)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def new_layers(plan: Plan) -> list[int]:
    """Positions that the base did not have: identity copies, and every layer that already stands further down."""
    seen: set[int] = set()
    new = []
    for position, source in enumerate(plan):
        if source.init == "identity" or source.layer in seen:
            new.append(position)
        seen.add(source.layer)
    return new


def seams(plan: Plan) -> list[tuple[int, int]]:
    """(position, jump) wherever a layer is not fed by the one below it in the base: jump = index - (index below + 1).

    An identity layer passes on what it is given, so it makes no seam. DUS of 32 with m = 8 has one: (24, -16).
    """
    found = []
    below = None
    for position, source in enumerate(plan):
        if source.init == "identity":
            continue
        if below is not None and source.layer != below + 1:
            found.append((position, source.layer - below - 1))
        below = source.layer
    return found


def layer_table(plan: Plan) -> str:
    """The plan for people: one line for each run of layers that come one after the other from the base."""
    new, jumps = set(new_layers(plan)), dict(seams(plan))
    runs: list[list[int]] = []  # [first, last] positions
    for position, source in enumerate(plan):
        before = plan[position - 1] if position else None
        joins = before is not None and (source.layer, source.init) == (before.layer + 1, before.init)
        if joins and position not in jumps and (position in new) == (position - 1 in new):
            runs[-1][1] = position
        else:
            runs.append([position, position])
    span = lambda first, last: f"{first}" if first == last else f"{first}-{last}"
    rows = []
    for first, last in runs:
        notes = ["new"] if first in new else []
        if first in jumps:
            here, jump = plan[first].layer, jumps[first]
            notes.append(f"seam {here - 1 - jump} -> {here}, jump {jump:+}")
        source = span(plan[first].layer, plan[last].layer)
        rows.append(f"  {span(first, last):>9}  <-  {source:>9}  {plan[first].init:<8}  {'; '.join(notes)}".rstrip())
    return "\n".join([f"  {'layers':>9}  <-  {'of base':>9}", *rows])
