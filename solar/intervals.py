"""Differences between models on the same text, with an interval and what it says of a claim.

What is compared is a contrast: a sum of some models' losses with signs, such as (loss of the base) - (loss of the grown
one). All models read the same windows of the same held-out documents, so the contrast is taken window by window, and
what is hard in a text for all of them falls out. Two things are samples in it:

- the documents. Windows of one document are alike, so the document is the unit, not the window: the variance is that of
  the documents' sums around a ratio (Cochran, Sampling Techniques, eq. 6.13), in each source for itself.
- the seeds, where there are several: the variance of the seeds' contrasts. Of one seed nothing can be said of others.

Each has an interval by Student's t, with one degree of freedom fewer than it has documents or seeds; the squares of
their half widths are added. What depends on seed and document together is counted twice in that, so the interval is
rather too wide than too narrow.

Shapes: S seeds, N windows.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
VERDICTS = SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown at this size", "contradicted"


class Stratum(NamedTuple):
    """The contrast on the windows of one source. weight: of the source's mean in the whole.

    nats: (S, N) sums over each window's tokens; tokens, documents: (N,) how many tokens are counted in each window, and
    which document it belongs to.
    """

    weight: float
    nats: np.ndarray
    tokens: np.ndarray
    documents: np.ndarray


class Interval(NamedTuple):
    """mean - half to mean + half, in nats a token for a contrast of losses."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def verdict(mean: float, half: float) -> str:
    """Shown if the interval lies above zero, the claimed side; contradicted if below; else not shown."""
    return SHOWN if mean > half else CONTRADICTED if mean < -half else NOT_SHOWN


def interval(strata: Sequence[Stratum]) -> Interval:
    """The weighted sum of the strata's means, in nats a token, with the 95% interval over documents and seeds.

    Raises ValueError for a stratum with fewer than two documents.
    """
    means = sum(part.weight * part.nats.sum(axis=1) / part.tokens.sum() for part in strata)  # (S,)
    halves = [_over_documents(part) for part in strata]
    if (seeds := len(means)) > 1:
        halves.append(quantile(seeds - 1) * means.std(ddof=1) / math.sqrt(seeds))
    return Interval(float(means.mean()), math.hypot(*halves))


def _over_documents(part: Stratum) -> float:
    """Half of the interval of the stratum's weighted mean, itself the mean over the seeds."""
    nats, tokens = part.nats.mean(axis=0), part.tokens
    residuals = nats - nats.sum() / tokens.sum() * tokens
    _, where = np.unique(part.documents, return_inverse=True)
    sums = np.bincount(where, residuals)
    if (documents := len(sums)) < 2:
        raise ValueError("one document says nothing of others: at least 2 are needed for an interval")
    error = math.sqrt(documents / (documents - 1) * (sums**2).sum()) / tokens.sum()
    return part.weight * quantile(documents - 1) * error


@cache
def quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """What Student's t with that many degrees of freedom stays below, in absolute value, with the given probability.

    With t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1), which is summed up to the quantile.
    """
    freedom = min(freedom, 1e5)  # beyond, the normal distribution to five digits
    widest = min(math.pi / 2, 40 / math.sqrt(freedom))
    angle = np.linspace(0, widest, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(confidence, below / below[-1], angle))
