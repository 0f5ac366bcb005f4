"""Hostile model directories, as Hypothesis strategies: `kinds` maps each class of them to a strategy and a number.

A case is what a directory holds, which command reads it, and what the refusal must name.
"""

from typing import Any

from hypothesis import strategies as st

from tests.hostile.headers import (
    PLACES,
    hole,
    huge,
    in_header,
    length_over,
    length_short,
    metadata,
    negative,
    nesting,
    odd_name,
    overflow,
    overlap,
    same_place,
    trailing,
    truncated,
    twice,
    unknown_dtype,
    wrong_dtype,
    wrong_type,
)
from tests.hostile.indexes import (
    ODDS,
    config_noise,
    config_odds,
    config_types,
    index_missing,
    index_noise,
    index_out,
    index_twice,
    index_wrong,
    params,
)
from tests.hostile.model import (
    CONFIG,
    NAMES,
    PARAMS,
    Case,
    archive,
    described,
    dumps,
    entries,
    legacy,
    numel,
    program,
    release,
    shard,
    sharded,
    single,
)
from tests.hostile.others import (
    beside_tokenizer,
    json_noise,
    no_files,
    plans,
    rules,
    sentencepiece_noise,
    sound_plan,
    upscale_json,
)
from tests.hostile.pickles import BOMBS, CALLS, CANARY, archives, bombs, code
from tests.hostile.values import SPECIAL

__all__ = [  # what the tests use beside `kinds`
    "BOMBS",
    "CALLS",
    "CANARY",
    "CONFIG",
    "NAMES",
    "PARAMS",
    "SPECIAL",
    "Case",
    "archive",
    "described",
    "dumps",
    "entries",
    "json_noise",
    "kinds",
    "legacy",
    "numel",
    "program",
    "release",
    "shard",
    "sharded",
    "single",
    "sound_plan",
]


def kinds(sentencepiece: bytes, tokenizer_json: dict | None) -> dict[str, tuple[Any, int]]:
    """Class -> (strategy of its cases, how many `make test` runs)."""
    found = {
        "a length over the file": (in_header(length_over), 25),
        "a length below the header's": (in_header(length_short), 25),
        "100 MB of JSON": (huge(), 20),
        "deep nesting": (in_header(nesting), 25),
        "a key twice": (in_header(twice), 25),
        "an overlap": (in_header(overlap), 20),
        "two at one place": (in_header(same_place), 20),
        "a hole": (in_header(hole), 20),
        "negative numbers": (in_header(negative), 25),
        "a dtype of no table": (in_header(unknown_dtype), 25),
        "a dtype of no weights": (in_header(wrong_dtype), 20),
        "a product that overflows": (in_header(overflow), 25),
        "trailing bytes": (in_header(trailing), 20),
        "an entry of wrong types": (in_header(wrong_type), 30),
        "metadata that is no text": (in_header(metadata), 20),
        "a name to spoil the line": (in_header(odd_name), 25),
        **{f"truncated: {place}": (truncated(place), 20) for place in PLACES},
        "index: out of the directory": (index_out(), 40),
        "index: a shard that is missing": (index_missing(), 30),
        "index: a tensor in two shards": (index_twice(), 20),
        "index: a tensor in the wrong shard": (index_wrong(), 30),
        "index: noise": (index_noise(), 30),
        "config: at odds with the tensors": (st.sampled_from(sorted(ODDS)).flatmap(config_odds), 150),
        "config: a field of another type": (config_types(), 30),
        "config: noise": (config_noise(), 30),
        "params.json": (params(), 40),
        "code in a pickle": (code(), 50),
        "a pickle that exhausts": (bombs(), 25),
        "an archive that is damaged": (archives(), 40),
        "tokenizer.model of noise": (sentencepiece_noise(sentencepiece), 40),
        "files beside the tokenizer": (beside_tokenizer(sentencepiece), 30),
        "a plan": (plans(), 40),
        "an upscale.json": (upscale_json(), 20),
        "rules of a merge": (rules(), 40),
        "no file": (no_files(), 30),
    }
    if tokenizer_json is not None:
        found["tokenizer.json of noise"] = json_noise(tokenizer_json), 40
    return found
