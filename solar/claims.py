"""What the papers claim of growing a model in depth, as data: the models to begin with, the trainings, the claims.

    START   a plan carried out on the base: dus, stack, idus-1, ...
    ARM     a start trained on: which of its parameters, on which text, for how many of the run's tokens
    CLAIM   a contrast of losses, before training or after, that lies above zero if the claim holds

Every threshold of the reproduction stands here, and stood here before anything was measured. `solar.reproduce` carries
all of it out. In the papers' letters: n layers in the base, m dropped at each side, g layers in a group of iDUS.

Claims that are in no paper are marked as ours: the paper chose m for its size and compared nothing.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from solar.intervals import CONTRADICTED, SHOWN, Stratum, interval, verdict
from solar.plan import Plan, Source, interlock, parse_plan, slices

# ------------------------------------------------------------------------------------------------ thresholds

EARLY = 1 / 8  # share of the tokens after which the recovery is looked at
RECOVERED = 1 / 2  # share of the gap that must have closed by then to be called fast
SLIGHT = 1 / 5  # of what iDUS-1 loses: DUS that loses less than that loses slightly
EQUAL = 1 / 10  # of the distance from DUS to iDUS-1: what differs from DUS by less than that is about equal to it
COLLAPSED = 1 / 2  # share of the way from the base to random weights that a collapsed model has gone

PARTS = {
    "a": "DUS drops, recovers fast and passes the base",
    "b": "DUS against other ways to the same depth, trained on the same tokens",
    "c": "the choice of m",
    "d": "the table of iDUS, without training",
    "e": "LLaMA Pro: new layers alone, on a new domain",
    "f": "the orderings of the paper's SFT, DPO and merge tables",
}

# ------------------------------------------------------------------------------------------------ starts and arms


def default_m(n: int) -> int:
    """The paper's share: 8 of 32."""
    return n // 4


def default_group(n: int, m: int) -> int:
    """Three groups in each copy, as 8 of 24 layers are in iDUS-8."""
    return max(round((n - m) / 3), 2)


def starts(n: int, m: int, group: int, further: dict[str, Plan]) -> dict[str, Plan | None]:
    """{name: plan} of every model that a training begins with; "random" is None: random weights in the shape of dus.

    further: plans of the user's own. Raises ValueError for a base of fewer than four layers, and as plans do.
    """
    if n < 4:
        raise ValueError(f"the model has {n} layers: DUS drops n // 4 of them, so at least 4 are needed")
    if group < 2:
        raise ValueError(f"--group {group}: groups of 1 are iDUS-1 already; at least 2 layers are wanted")
    plans = {
        "base": slices(n, [(0, n)]),
        "dus": interlock(n, m, n - m),
        "stack": parse_plan("stack", n),
        "idus-1": interlock(n, m, 1),
        f"idus-{group}": interlock(n, m, group),
        "pro": parse_plan("expand", n),
        "random": None,
    }
    for other in other_ms(n, m):
        plans[f"dus-m{other}"] = interlock(n, other, n - other)
    k = len(plans["pro"]) - n  # as many new layers, all below or all above the base
    copies = lambda layers: [Source(layer, "identity") for layer in layers]
    plans["pro-prefix"] = copies(range(k)) + plans["base"]
    plans["pro-suffix"] = plans["base"] + copies(range(n - k, n))
    for name, plan in further.items():
        if name in plans:
            raise ValueError(f"--plans: {name} is the name of a plan of the reproduction; give it another")
        plans[name] = plan
    return plans


def other_ms(n: int, m: int) -> list[int]:
    """Values of m on both sides of the paper's: a sixth and a third of the layers."""
    return [other for other in (n // 6, n // 3) if other not in (0, m)]


class Arm(NamedTuple):
    """A training: of which start, for which share of the run's tokens, of which parameters (train.py's --train), on
    which text."""

    start: str
    share: float = 1.0
    train: Literal["all", "new"] = "all"
    text: Literal["old", "new"] = "old"


def arms(plans: dict[str, Plan | None], flops_ratio: float) -> dict[str, Arm]:
    """{name: arm}. flops_ratio: of a token of dus to one of the base, so that base-flops costs what dus costs."""
    domain = {
        "domain-pro": Arm("pro", train="new", text="new"),
        "domain-full": Arm("base", text="new"),
        "domain-prefix": Arm("pro-prefix", train="new", text="new"),
        "domain-suffix": Arm("pro-suffix", train="new", text="new"),
    }
    return {
        **{name: Arm(name) for name in plans if name not in ("pro", "pro-prefix", "pro-suffix")},
        "pro": Arm("pro", train="new"),
        "base-early": Arm("base", EARLY),
        "dus-early": Arm("dus", EARLY),
        "base-flops": Arm("base", flops_ratio),
        **domain,
    }


# ------------------------------------------------------------------------------------------------ claims


class Term(NamedTuple):
    """A loss: of a start before training, or of an arm after it, on the old text or on the new domain."""

    name: str
    trained: bool
    text: Literal["old", "new"] = "old"


class Claim(NamedTuple):
    """One row: what is claimed, where, and the contrast {term: coefficient} that is above zero if it holds.

    exact: the contrast is claimed to be zero, for every window.
    distance: of the contrast only the size counts, and it must stay below the terms given here.
    """

    part: str
    what: str
    where: str
    contrast: dict[Term, float]
    exact: bool = False
    distance: dict[Term, float] | None = None

    @property
    def terms(self) -> list[Term]:
        """Every loss that is needed."""
        return list(self.contrast | (self.distance or {}))


def before(name: str, text: str = "old") -> Term:
    """The loss of a start."""
    return Term(name, False, text)


def after(name: str, text: str = "old") -> Term:
    """The loss of an arm."""
    return Term(name, True, text)


def lower(better: Term, worse: Term) -> dict[Term, float]:
    """Above zero if `better` has the lower loss."""
    return {worse: 1.0, better: -1.0}


def untrained(better: str, worse: str) -> dict[Term, float]:
    """The start `better` has the lower loss of two."""
    return lower(before(better), before(worse))


def trained(better: str, worse: str, text: str = "old") -> dict[Term, float]:
    """The arm `better` has the lower loss of two."""
    return lower(after(better, text), after(worse, text))


def trained_mean(better: str, worse: str) -> dict[Term, float]:
    """The arm `better` has the lower mean of the losses on both texts."""
    both = trained(better, worse) | trained(better, worse, "new")
    return {term: factor / 2 for term, factor in both.items()}


SOLAR, LESA, OURS = "arXiv:2312.15166, section 2", "arXiv:2502.13794", "ours"
IDUS = "iDUS, Open LLM Leaderboard"
PRO, LAW = "arXiv:2401.02415, section 3", "arXiv:2401.02415, ablation on law"


def claims(n: int, m: int, group: int, further: list[str]) -> list[Claim]:
    """All claims of parts a to e, in the order of the report. further: names of the user's own plans."""
    return [*recovery(), *rivals(group, further), *choice_of_m(n, m), *table_of_idus(group), *llama_pro()]


def recovery() -> list[Claim]:
    """Part a."""
    gap = {before("dus"): RECOVERED, before("base"): -RECOVERED, after("dus-early"): -1.0, after("base-early"): 1.0}
    closed = f"after {EARLY:.1%} of the tokens more than {RECOVERED:.0%} of the gap to the base trained alike is closed"
    than = "trained, DUS is better than the base"
    return [
        Claim("a", "up-scaled and not trained, DUS is worse than the base", SOLAR, untrained("base", "dus")),
        Claim("a", closed, SOLAR, gap),
        Claim("a", f"{than} untrained", SOLAR, lower(after("dus"), before("base"))),
        Claim("a", f"{than} trained on as many tokens", SOLAR, trained("dus", "base")),
        Claim("a", f"{than} trained with as many operations", SOLAR, trained("dus", "base-flops")),
    ]


def rivals(group: int, further: list[str]) -> list[Claim]:
    """Part b."""
    than = "trained, DUS is better than"
    rows = [
        Claim("b", "not trained, DUS is better than naive stacking", SOLAR, untrained("dus", "stack")),
        Claim("b", f"{than} the base, trained on as it is", SOLAR, trained("dus", "base")),
        Claim("b", f"{than} naive stacking", SOLAR, trained("dus", "stack")),
        Claim("b", f"{than} iDUS-1", IDUS, trained("dus", "idus-1")),
        Claim("b", f"{than} iDUS-{group}", OURS, trained("dus", f"idus-{group}")),
        Claim("b", f"{than} random weights of its shape", SOLAR, trained("dus", "random")),
        Claim("b", "LLaMA Pro, only its new layers trained, is better than DUS", LESA, trained("pro", "dus")),
    ]
    for name in further:
        rows.append(Claim("b", f"not trained, {name} is better than DUS", OURS, untrained(name, "dus")))
        rows.append(Claim("b", f"trained, {name} is better than DUS", OURS, trained(name, "dus")))
    return rows


def choice_of_m(n: int, m: int) -> list[Claim]:
    """Part c."""
    name = lambda value: "dus" if value == m else f"dus-m{value}"
    rows = []
    for less, more in pairwise(sorted([*other_ms(n, m), m])):
        shorter = f"not trained, m = {more}, with the shorter jump at the seam, is better than m = {less}"
        rows.append(Claim("c", shorter, SOLAR, untrained(name(more), name(less))))
    for other in other_ms(n, m):
        rows.append(Claim("c", f"trained, m = {m} is better than m = {other}", OURS, trained("dus", name(other))))
    return rows


def table_of_idus(group: int) -> list[Claim]:
    """Part d."""
    one, some = before("idus-1"), f"idus-{group}"
    slightly = f"DUS is slightly below: it loses less than {SLIGHT:.0%} of what iDUS-1 loses"
    equal = f"iDUS-{group} is about equal to DUS: within {EQUAL:.0%} of the distance to iDUS-1"
    collapse = f"iDUS-1 collapses: it has gone more than {COLLAPSED:.0%} of the way to random weights"
    return [
        Claim("d", "DUS is below the base", IDUS, untrained("base", "dus")),
        Claim("d", slightly, IDUS, {one: SLIGHT, before("base"): 1 - SLIGHT, before("dus"): -1.0}),
        Claim("d", equal, IDUS, untrained("dus", some), distance={one: EQUAL, before("dus"): -EQUAL}),
        Claim("d", collapse, IDUS, {one: 1.0, before("random"): -COLLAPSED, before("base"): COLLAPSED - 1}),
    ]


def llama_pro() -> list[Claim]:
    """Part e."""
    alone, whole = "its new layers alone", "than the base trained whole"
    between = "new layers in between are better in that mean than all"
    return [
        Claim("e", "not trained, it computes what the base computes", PRO, untrained("pro", "base"), exact=True),
        Claim("e", f"{alone} learn the new domain", PRO, lower(after("domain-pro", "new"), before("base", "new"))),
        Claim("e", f"{alone} learn it better {whole}", LAW, trained("domain-pro", "domain-full", "new")),
        Claim("e", f"{alone} keep more of the old text {whole}", PRO, trained("domain-pro", "domain-full")),
        Claim("e", f"{alone} are better in the mean of both {whole}", LAW, trained_mean("domain-pro", "domain-full")),
        Claim("e", f"{between} below the base", LAW, trained_mean("domain-pro", "domain-prefix")),
        Claim("e", f"{between} above it", LAW, trained_mean("domain-pro", "domain-suffix")),
    ]


def needed(rows: list[Claim]) -> dict[tuple[str, bool], set[str]]:
    """{(start or arm, whether trained): the texts that it must be measured on} of all that the claims are made of."""
    found: dict[tuple[str, bool], set[str]] = {}
    for term in (term for row in rows for term in row.terms):
        found.setdefault((term.name, term.trained), set()).add(term.text)
    return found


# ------------------------------------------------------------------------------------------------ findings


class Sample(NamedTuple):
    """Held-out windows of one source, (N,) each: how many tokens are counted in them, and the document of each. weight:
    of the source in its text."""

    source: str
    weight: float
    tokens: np.ndarray
    documents: np.ndarray


class Finding(NamedTuple):
    """A claim with what was measured. value: to be read; above zero is the claimed side."""

    part: str
    what: str
    where: str
    value: str
    verdict: str


Losses = Callable[[Term, str], np.ndarray]  # (term, source) -> (S, N) nats of each seed and window


def strata(contrast: dict[Term, float], samples: dict[str, list[Sample]], losses: Losses) -> list[Stratum]:
    """A contrast on every source of every text that it has terms of."""
    found = []
    for text in dict.fromkeys(term.text for term in contrast):
        terms = [(term, factor) for term, factor in contrast.items() if term.text == text]
        for sample in samples[text]:
            nats = sum(factor * losses(term, sample.source) for term, factor in terms)
            found.append(Stratum(sample.weight, nats, sample.tokens, sample.documents))
    return found


def find(claim: Claim, samples: dict[str, list[Sample]], losses: Losses) -> Finding:
    """Measure a claim."""
    parts = strata(claim.contrast, samples, losses)
    if claim.exact:
        largest = max(float(np.abs(part.nats).max()) for part in parts)
        value = f"largest difference of a window: {largest:.3g}"
        return Finding(claim.part, claim.what, claim.where, value, CONTRADICTED if largest else SHOWN)
    if claim.distance is not None:
        sign = 1.0 if interval(parts).mean > 0 else -1.0
        both = claim.distance | {
            term: claim.distance.get(term, 0.0) - sign * factor for term, factor in claim.contrast.items()
        }
        parts = strata(both, samples, losses)
    found = interval(parts)
    return Finding(claim.part, claim.what, claim.where, str(found), verdict(*found))
