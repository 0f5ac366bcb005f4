"""Tokenizers of noise, plans, rules, and what is no file at all."""

import json
from typing import Any

from hypothesis import strategies as st

from tests.hostile.model import SHARDS, SINGLE, Case, dumps, legacy, release, sharded, single
from tests.hostile.values import COMMANDS, SPECIAL, anything, cut, much, no_json, noise


@st.composite
def sentencepiece_noise(draw, whole: bytes) -> Case:
    """Noise, or a model that is cut short."""
    bad = (
        noise | cut(whole) | st.builds(lambda at, more: whole[:at] + more, st.integers(0, 3000), st.binary(min_size=9))
    )
    bad |= st.just(whole.replace(b"</s>", b"</\xff>"))  # a piece that is no text
    bad |= st.just(whole[: whole.rindex(b"\x1a\x0e\n\x08identity")])  # all pieces, and not how text becomes pieces
    return Case(single() | {"tokenizer.model": draw(bad)}, ("tokenizer.model",), "generate")


@st.composite
def json_noise(draw, whole: dict) -> Case:
    """A tokenizer.json of noise, cut short, or with another thing in the place of one part."""
    text = dumps(whole)
    part = draw(st.sampled_from(["model", "decoder", "added_tokens", "pre_tokenizer", "post_processor", "normalizer"]))
    other = anything.filter(lambda value: value not in (None, {}) and not isinstance(value, list))
    bad = draw(no_json | cut(text) | other.map(lambda value: dumps(whole | {part: value})))
    return Case(single() | {"tokenizer.json": bad}, ("tokenizer.json",), "generate")


@st.composite
def beside_tokenizer(draw, whole: bytes) -> Case:
    """Files beside a sound tokenizer: malformed, of the wrong type, or with ids and texts that are none."""
    file = draw(st.sampled_from(["tokenizer_config.json", "added_tokens.json"]))
    ids = st.sampled_from([-1, 2**24, 2**63, 10**30, 1.5, 1e400, "7", None, True])
    texts = st.sampled_from(["\ud800", "a\udfff", None, 7, ["x"]])
    no_dict = anything.filter(lambda value: not isinstance(value, dict)).map(dumps)
    if file == "added_tokens.json":
        bad = no_json | no_dict | ids.map(lambda i: json.dumps({"<x>": i}).encode())
        bad |= st.just(dumps({"\ud800": 600}))
    else:
        keys = st.sampled_from(["-1", "x", "1.5", "9" * 5000, str(2**24), "Infinity"])
        entry = st.sampled_from([None, 7, [], {}, {"content": None}, {"content": {"a": 1}}])
        decoder = st.builds(lambda key, value: {key: value}, keys, st.just({"content": "<x>"}))
        decoder |= st.builds(lambda value: {"600": value}, entry)
        decoder |= st.builds(lambda text: {"600": {"content": text}}, texts)
        bad = no_json | no_dict | decoder.map(lambda value: dumps({"added_tokens_decoder": value}))
    return Case(single() | {"tokenizer.model": whole, file: draw(bad)}, (file, "tokenizer.model"), "generate")


# ------------------------------------------------------------------------------------------------ other files

sound_plan = [{"layer": 0}, {"layer": 1}, {"layer": 0, "init": "identity"}]


@st.composite
def plans(draw) -> Case:
    """A plan, or an upscale.json, that is none for this model."""
    entry = st.sampled_from(
        [{"layer": layer} for layer in (2, -1, True, "0", 10**400)]
        + [
            {"layer": 0, "init": "zero"},
            {"layer": 0, "init": ["copy"]},
            {"layer": 0, "x": 1},
            {"init": "copy"},
            7,
            None,
        ]
    )
    odd = st.builds(lambda at, value: [*sound_plan[:at], value, *sound_plan[at:]], st.integers(0, 3), entry | anything)
    odd = odd.filter(lambda plan: not all(map(_is_sound_entry, plan))) | st.just([])
    odd |= st.integers(10_001, 20_000).map(lambda n: [{"layer": 0}] * n)
    record = odd.map(lambda plan: {"plan": plan}) | anything.filter(lambda value: not isinstance(value, list))
    bad = no_json | cut(dumps(sound_plan)) | odd.map(dumps) | record.map(dumps)
    bad |= st.just(b'[{"layer":0,"layer":1}]') | st.builds(much, st.just(b'{"layer":0},'), st.just(6_000_000))
    command = draw(st.sampled_from(["upscale", "load", "generate"]))
    text = draw(bad)
    return Case(
        single(), ("plan.json", "num_hidden_layers"), command, ("--plan", "{beside}/plan.json"), {"plan.json": text},
        header=len(text),
    )  # fmt: skip


def _is_sound_entry(entry: Any) -> bool:
    sound = isinstance(entry, dict) and {"layer"} <= entry.keys() <= {"layer", "init"}
    return (
        sound
        and type(entry["layer"]) is int
        and entry["layer"] in (0, 1)
        and entry.get("init") in ("copy", "identity", None)
    )


@st.composite
def upscale_json(draw) -> Case:
    """An upscale.json that should say which layers are new, for `--train new`."""
    layers = anything.filter(lambda value: not isinstance(value, list) or any(type(i) is not int for i in value))
    no_record = anything.filter(lambda value: not isinstance(value, dict) or "new_layers" not in value)
    bad = no_json | no_record.map(dumps) | layers.map(lambda value: dumps({"new_layers": value}))
    return Case(single() | {"upscale.json": draw(bad)}, ("upscale.json",), "trainable")


@st.composite
def rules(draw) -> Case:
    """Rules of a merge that are none."""
    sound = {"layers": "0-1", "weights": [1, 2]}
    odd = st.sampled_from(
        [{"weights": [1, 2]}, {"layers": "1-0", "weights": [1, 2]}, {"layers": "9" * 9, "weights": [1, 2]}]
        + [{"layers": [0, 1], "weights": [1, 2]}, sound | {"weights": [1]}, sound | {"weights": [-1, 1]}]
        + [sound | {"weights": [10**400, 0.5]}, sound | {"weights": [0, 0]}, sound | {"weights": "12"}]
        + [{"tensors": text, "weights": [1, 2]} for text in ("(", "x{99999999999}", "(" * 5000, "[", "\\", "(?P<a", 7)]
        + [{"tensors": "nothing matches\n", "weights": [1, 2]}, sound | {"x": 1}]
    )
    wrong = anything.filter(lambda value: not isinstance(value, list))
    bad = no_json | cut(dumps([sound])) | wrong.map(dumps)
    bad |= st.builds(lambda value: dumps([sound, value]), odd | anything)
    text = draw(bad)
    arguments = ("--per-layer", "{beside}/rules.json")
    return Case(single(), ("rules.json",), "merge", arguments, {"rules.json": text})


@st.composite
def no_files(draw) -> Case:
    """What stands in the place of a file and cannot be read to its end, or at all."""
    replaced = {
        single: ["config.json", SINGLE, "tokenizer.model"],
        sharded: ["config.json", *SHARDS],
        legacy: ["pytorch_model.bin"],
        release: ["params.json", "consolidated.safetensors"],
    }
    whole = draw(st.sampled_from(list(replaced)))
    names = replaced[whole]
    file = draw(st.sampled_from(names))
    command = "generate" if file == "tokenizer.model" else draw(COMMANDS)
    return Case(whole() | {file: draw(st.sampled_from(SPECIAL))}, ("model", file), command)
