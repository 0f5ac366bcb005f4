"""The claims as data: their plans, what they are made of, and verdicts on losses that are known."""

import numpy as np
import pytest

from solar import claims
from solar.claims import Claim, Sample, after, before, find, lower
from solar.intervals import CONTRADICTED, NOT_SHOWN, SHOWN
from solar.plan import parse_plan

SAMPLES = {text: [Sample(text, 1.0, np.full(8, 10), np.arange(8))] for text in ("old", "new")}


def verdict_of(claim: Claim, **losses: float) -> str:
    """losses: nats a token by name, dus for a start and dus_trained for an arm; a little noise makes them a sample."""
    noise = np.random.default_rng(0)

    def nats(term, source):
        key = (
            term.name.replace("-", "_") + ("_trained" if term.trained else "") + ("_new" if term.text == "new" else "")
        )
        return 10 * (losses[key] + 0.001 * noise.normal(size=(1, 8)))

    return find(claim, SAMPLES, nats).verdict


def claim(part: str, words: str) -> Claim:
    (found,) = [row for row in claims.claims(12, 3, 3, []) if row.part == part and words in row.what]
    return found


def test_the_papers_own_sizes():
    assert claims.default_m(32) == 8
    assert claims.default_group(32, 8) == 8
    plans = claims.starts(32, 8, 8, {})
    assert {name: len(plan) for name, plan in plans.items() if plan} == {
        "base": 32, "dus": 48, "stack": 64, "idus-1": 48, "idus-8": 48, "pro": 40, "dus-m5": 54, "dus-m10": 44,
        "pro-prefix": 40, "pro-suffix": 40,
    }  # fmt: skip
    assert plans["dus"] == parse_plan("dus:8", 32)
    assert plans["idus-8"] == parse_plan("idus:8:8", 32)


def test_new_layers_below_and_above_are_identity_copies_beside_the_whole_base():
    plans = claims.starts(12, 3, 3, {})
    assert [source.layer for source in plans["pro-prefix"]] == [0, 1, 2, *range(12)]
    assert [source.layer for source in plans["pro-suffix"]] == [*range(12), 9, 10, 11]
    for name, new in (("pro-prefix", slice(3)), ("pro-suffix", slice(12, None))):
        assert {source.init for source in plans[name][new]} == {"identity"}
        assert sum(source.init == "identity" for source in plans[name]) == 3


@pytest.mark.parametrize(("n", "m", "group", "further"), [(12, 3, 3, {}), (30, 8, 8, {"searched": []}), (6, 1, 2, {})])
def test_every_claim_is_about_models_that_there_are(n, m, group, further):
    plans = claims.starts(n, m, group, further)
    arms = claims.arms(plans, 1.5)
    for row in claims.claims(n, m, group, list(further)):
        assert set(row.part) <= claims.PARTS.keys()
        for term in row.terms:
            assert term.name in (arms if term.trained else plans), row.what
    assert {arm.start for arm in arms.values()} <= plans.keys()


def test_what_is_needed_is_what_the_claims_are_made_of():
    rows = [row for row in claims.claims(12, 3, 3, []) if row.part == "d"]
    starts = ("base", "dus", "idus-1", "idus-3", "random")
    assert claims.needed(rows) == {(name, False): {"old"} for name in starts}
    rows = [row for row in claims.claims(12, 3, 3, []) if row.part == "e"]
    found = claims.needed(rows)
    assert found["domain-full", True] == {"old", "new"}
    assert found["base", False] == {"old", "new"}


def test_a_recovery_is_fast_if_more_than_half_of_the_gap_is_closed():
    fast = claim("a", "of the gap")
    known = {"base": 1.0, "dus": 2.0, "base_early_trained": 0.8}
    assert verdict_of(fast, **known, dus_early_trained=1.2) == SHOWN
    assert verdict_of(fast, **known, dus_early_trained=1.4) == CONTRADICTED
    assert verdict_of(fast, **known, dus_early_trained=1.3) == NOT_SHOWN


def test_passing_the_base_is_a_lower_loss():
    for words, rival in (("on as many tokens", "base_trained"), ("as many operations", "base_flops_trained")):
        passes = claim("a", words)
        assert verdict_of(passes, dus_trained=0.9, **{rival: 1.0}) == SHOWN
        assert verdict_of(passes, dus_trained=1.0, **{rival: 0.9}) == CONTRADICTED


def test_the_table_of_idus():
    """On the perplexities of SmolLM2 with m = 8 that the table was first looked at with: 27.0, 40.5, 47.4, 8,982."""
    known = dict(zip(("base", "dus", "idus_3", "idus_1"), np.log([27.0, 40.5, 47.4, 8982]), strict=True))
    known["random"] = float(np.log(49152))
    slightly, equal, collapsed = (claim("d", words) for words in ("slightly", "about equal", "collapses"))
    assert [verdict_of(row, **known) for row in (slightly, equal, collapsed)] == [SHOWN] * 3
    assert verdict_of(slightly, **known | {"dus": 5.0}) == CONTRADICTED
    assert verdict_of(equal, **known | {"idus_3": 5.0}) == CONTRADICTED
    assert verdict_of(equal, **known | {"idus_3": 1.0}) == CONTRADICTED  # much better is not equal either
    assert verdict_of(collapsed, **known | {"idus_1": 6.0}) == CONTRADICTED


def test_the_mean_of_both_texts_weighs_them_alike():
    mean = claim("e", "mean of both")
    full = {"domain_full_trained": 2.0, "domain_full_trained_new": 1.0}
    assert verdict_of(mean, **full, domain_pro_trained=1.5, domain_pro_trained_new=1.2) == SHOWN
    assert verdict_of(mean, **full, domain_pro_trained=1.5, domain_pro_trained_new=1.8) == CONTRADICTED


def test_an_identity_is_shown_by_equality_alone():
    same = claim("e", "computes what the base computes")
    losses = {"pro": np.ones((1, 8)), "base": np.ones((1, 8))}
    assert find(same, SAMPLES, lambda term, source: losses[term.name]).verdict == SHOWN
    losses["pro"] = losses["base"].copy()
    losses["pro"][0, 3] += 1e-7
    found = find(same, SAMPLES, lambda term, source: losses[term.name])
    assert (found.verdict, found.value) == (CONTRADICTED, "largest difference of a window: 1e-07")


def test_what_is_measured_is_written_with_its_interval():
    row = Claim("a", "what", "where", lower(after("dus"), before("base")))
    found = find(row, SAMPLES, lambda term, source: np.full((1, 8), 20.0 if term.trained else 25.0))
    assert found == ("a", "what", "where", "+0.5000 ± 0.0000", SHOWN)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 4"):
        claims.starts(3, 0, 2, {})
    with pytest.raises(ValueError, match="--group 1: groups of 1 are iDUS-1"):
        claims.starts(12, 3, 1, {})
    with pytest.raises(ValueError, match="--plans: stack is the name"):
        claims.starts(12, 3, 3, {"stack": []})
