"""Examples that are what encode_chat makes of every usable row, once, and what is said of every other row."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from solar import examples, shards
from solar.corpus import Source
from solar.examples import Chats, Pairs, prepare
from solar.tokenizer import Tokenizer, encode_chat
from solar.tokens import Manifest

ROWS = [{"instruction": f"What is {n} + {n}?", "output": f"It is {2 * n}, größer 🙂 than {n}."} for n in range(60)]
PAIRS = [{"prompt": f"What is {n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": f"{n}?"} for n in range(60)]
lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
chat = lambda row: [
    {"role": "user", "content": row.get("instruction", row.get("prompt"))},
    {"role": "assistant", "content": row.get("output", row.get("chosen"))},
]


@pytest.fixture(scope="session")
def tokenizer(sentencepiece_model):
    return Tokenizer(sentencepiece_model)


@pytest.fixture
def ready(tokenizer, tmp_path):
    """ready(path, **options) -> {split: its examples}"""

    def ready(path, limit=None, holdout=0.0, template="solar", max_length=128, pairs=False, **options):
        source = Source(str(path), limit=limit)
        directory = prepare(
            source, tokenizer, tmp_path / "cache", holdout, template, max_length, pairs, workers=1, **options
        )
        kind = Pairs if pairs else Chats
        return {split: kind(directory, split, tokenizer.vocab_size) for split in ("train", "heldout")}

    return ready


def encodings(split):
    return [[(example.ids.tolist(), example.learned.tolist()) for example in parts] for _, parts in split.units()]


def test_both_sides_are_what_encode_chat_gives(write, ready, tokenizer):
    made = ready(write({"a.jsonl": lines(ROWS)}), holdout=0.3)
    expected = [[encode_chat(tokenizer, "solar", chat(row))] for row in ROWS]
    train, held_out = encodings(made["train"]), encodings(made["heldout"])
    assert 5 < len(held_out) < 35
    assert train == [example for example in expected if example in train]  # in the order of the file
    assert sorted(train + held_out) == sorted(expected)
    lengths = made["train"].lengths()
    assert lengths.tolist() == [len(ids) for [(ids, _)] in train]
    count, _ = made["train"].tally().pop("tokens are learned")
    assert count == sum(sum(learned) for [(_, learned)] in train)
    assert not made["train"].tally().keys() - {"tokens are learned"}
    assert [index for index, _ in made["train"].units([3, 1])] == [3, 1]


def test_pairs_stand_side_by_side(write, ready, tokenizer):
    rows = [*PAIRS[:3], {"prompt": [*chat(ROWS[0]), chat(ROWS[1])[0]], "chosen": "yes", "rejected": "no"}]
    made = ready(write({"a.jsonl": lines(rows)}), pairs=True, max_length=256)["train"]
    assert len(made) == 4
    for row, (chosen, rejected) in zip(rows[:3], encodings(made), strict=False):
        assert chosen == encode_chat(tokenizer, "solar", chat(row))
        assert rejected == encode_chat(tokenizer, "solar", chat(row | {"chosen": row["rejected"]}))
    chosen, rejected = made.example(3)
    assert tokenizer.decode(chosen.ids[chosen.learned]) == "yes"  # not the earlier answer
    assert tokenizer.decode(rejected.ids[rejected.learned]) == "no"
    assert made.lengths().tolist() == [sum(len(ids) for ids, _ in parts) for parts in encodings(made)]


@pytest.mark.parametrize("form", ["jsonl", "list", "lines in .json", "directory"])
def test_every_form_of_file(form, write, ready):
    files = {
        "jsonl": {"a.jsonl": "\ufeff" + lines(ROWS[:4]).replace("\n", "\n\n")},
        "list": {"a.json": json.dumps(ROWS[:4], indent=1)},
        "lines in .json": {"a.json": lines(ROWS[:4])},
        "directory": {
            "a.json": json.dumps(ROWS[:2]), "sub/b.jsonl": lines(ROWS[2:4]), "README.md": "x", ".c.json": "[",
            "a.ref.jsonl": '{"format": "solar reference, version 1"}\n', "sub/b.ref.jsonl": "",
        },
    }[form]  # fmt: skip
    folder = write(files)
    made = ready(folder if form == "directory" else folder / next(iter(files)))
    assert encodings(made["train"]) == encodings(ready(write({"x.jsonl": lines(ROWS[:4])}, "other"))["train"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(ROWS[:2]) + "{\n", r"a\.jsonl, line 3: no JSON; --skip-bad-lines leaves it out"),
        ("a.jsonl", lines([ROWS[0], {"instruction": "x"}]), r"a\.jsonl, line 2: no answer"),
        ("a.jsonl", lines([ROWS[0], ROWS[1] | {"question": "x"}]), r"line 2: two .* 'instruction' and 'question'"),
        ("a.json", json.dumps([ROWS[0], 3]), r"a\.json, row 2: JSON, but no object; --skip-bad-lines"),
        ("a.json", "[1, 2", r"a\.json: begins like a list, but is not JSON"),
        ("a.json", '{"data":\n []}', r"a\.json: one JSON value; a list of rows"),
        ("a.json", "[]", r"a\.json: none of its 0 rows can be used; empty"),
        ("a.jsonl", "", r"a\.jsonl: none of its 0 rows can be used; empty"),
        ("a.txt", "Hi", r"text: no \.jsonl or \.json file in it"),
    ],
)
def test_bad_files_and_rows_are_named(name, content, message, write, ready):
    with pytest.raises(ValueError, match=message):
        ready(write({name: content}))


def test_bad_rows_are_skipped_and_counted(write, ready):
    bad = [{"instruction": "x"}, {"instruction": "x", "output": ""}, {"instruction": "y", "output": " "}]
    folder = write({"a.jsonl": lines([ROWS[0], *bad, ROWS[1]]), "b.jsonl": lines(ROWS[2:3])})
    made = ready(folder, skip_bad_lines=True)["train"]
    assert len(made) == 3
    assert made.manifest.skipped == {
        str(folder / "a.jsonl"): {
            "no answer (output, response, completion, answer)": (1, "line 2"), "an empty answer": (2, "line 3"),
        }
    }  # fmt: skip
    assert made.manifest.skipped[str(folder / "a.jsonl")].lines()[1] == "an empty answer: 2 (first: line 3)"
    write({"b.jsonl": lines(bad)})
    with pytest.raises(ValueError, match=r"b\.jsonl: none of its 3 rows can be used; line 1: no answer.*line 2"):
        ready(folder, skip_bad_lines=True)


def test_a_row_that_the_template_cannot_express(write, ready):
    system = {"messages": [{"role": "system", "content": "s"}, *chat(ROWS[1])]}
    rows = [ROWS[0], system, {"system": "s", "instruction": "x", "input": "y", "output": "z"}]
    folder = write({"a.jsonl": lines(rows)})
    with pytest.raises(ValueError, match=r"line 2: alpaca takes one user message and its answer: no system message"):
        ready(folder, template="alpaca")
    made = ready(folder, template="alpaca", skip_bad_lines=True)["train"]
    assert len(made) == 1
    assert made.manifest.skipped[str(folder / "a.jsonl")].total() == 2
    assert len(ready(folder)["train"]) == 3


def test_what_no_row_can_change_is_said_first(ready, tokenizer, write):
    folder = write({"a.jsonl": lines(ROWS)})
    with pytest.raises(ValueError, match=r"no token <\|im_start\|>"):
        ready("nowhere", template="chatml")
    with pytest.raises(ValueError, match="unknown template 'x'"):
        ready("nowhere", template="x")
    with pytest.raises(ValueError, match="--too-long x: one of drop, truncate"):
        ready(folder, too_long="x")
    with pytest.raises(ValueError, match="problems is a corpus of text"):
        ready("problems")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ready("nowhere")
    with pytest.raises(ValueError, match="not of the format 'solar preference pairs, version 3'"):
        Pairs(ready(folder)["train"].directory, "train", tokenizer.vocab_size)
    with pytest.raises(ValueError, match=r"holds the token id \d+, but the model's vocabulary has 40"):
        Chats(ready(folder)["train"].directory, "train", 40)


def test_too_long_is_dropped_or_cut(write, ready, tokenizer):
    long, longer = ({"instruction": "Say it.", "output": "word " * n} for n in (30, 300))
    far = {"instruction": "word " * 300, "output": "x"}
    folder = write({"a.jsonl": lines([ROWS[0], long, longer, far, longer | {"instruction": "Say it again."}])})
    place = str(folder / "a.jsonl")
    made = ready(folder)["train"]
    assert len(made) == 2
    assert made.tally()["dropped, longer than 128 tokens"] == (3, f"{place}, line 3")
    made = ready(folder, too_long="truncate")["train"]
    assert made.lengths().tolist()[2:] == [128, 128]
    assert made.tally()["cut to 128 tokens"] == (2, f"{place}, line 3")
    assert made.tally()["dropped, since nothing of the answer is within 128 tokens"] == (1, f"{place}, line 4")
    ids, learned = encode_chat(tokenizer, "solar", chat(longer))
    assert encodings(made)[2] == [(ids[:128], learned[:128])]
    with pytest.raises(ValueError, match=r"no example in it is left; dropped, longer than 8 tokens: 5 \(first"):
        ready(folder, max_length=8)


def test_a_pair_is_cut_where_it_is_longer(write, ready):
    word = lambda n: "word " * n
    rows = [
        {"prompt": "Say it.", "chosen": word(300), "rejected": "No."},
        {"prompt": "Say it.", "chosen": word(300), "rejected": "No, " + word(300)},
        {"prompt": "Say it.", "chosen": word(300), "rejected": word(301)},  # differ behind the cut
        {"prompt": word(100), "chosen": "a", "rejected": "b"},
    ]
    made = ready(write({"a.jsonl": lines(rows)}), pairs=True, too_long="truncate")["train"]
    assert len(made) == 2
    assert made.lengths().tolist() == [128, 128]
    (chosen, rejected), (second, third) = (made.example(i) for i in range(2))
    assert len(rejected.ids) < 40 < len(chosen.ids)
    assert len(second.ids) == len(third.ids) == 64
    tally = {reason: count for reason, (count, _) in made.tally().items()}
    assert tally["dropped, since chosen and rejected are the same tokens"] == 1
    assert tally["dropped, since nothing of the answer is within 128 tokens"] == 1
    assert tally["cut to 128 tokens"] == 2


def test_a_question_is_never_on_both_sides(write, ready, tokenizer):
    rows = [row | {"output": f"{row['output']} {n}"} for row in ROWS for n in range(3)]
    rows += [{"system": "Be brief.", "prompt": row["instruction"], "response": "x"} for row in ROWS]
    rows += [{"messages": chat(row) + chat(ROWS[0])} for row in ROWS]
    made = ready(write({"a.jsonl": lines(rows)}), holdout=0.3, max_length=400)
    pairs = ready(write({"b.jsonl": lines(PAIRS)}, "pairs"), holdout=0.3, pairs=True, max_length=400)

    def questions(split):
        texts = [tokenizer.decode(parts[0].ids) for _, parts in split.units()]
        return {text.partition("### User:\n")[2].partition("\n\n")[0] for text in texts}

    train, held_out = questions(made["train"]), questions(made["heldout"])
    assert len(train) + len(held_out) == 60
    assert not train & held_out
    assert (questions(pairs["train"]), questions(pairs["heldout"])) == (train, held_out)


def test_rephrasings_are_on_the_side_of_what_they_rephrase(write, ready, tokenizer):
    seeds = [row | {"output": "seed"} for row in ROWS]
    told = [
        {"instruction": f"Tell me, please, in form {n}: 2 * {row['instruction']}", "output": "x"}
        | {"original_question": row["instruction"]}
        for row in ROWS
        for n in range(3)
    ]
    pairs = [{"prompt": row["instruction"], "chosen": "a", "rejected": "b"} | row for row in told]
    made = ready(write({"a.jsonl": lines(seeds + told)}), holdout=0.3)
    compared = ready(write({"b.jsonl": lines(pairs)}, "pairs"), holdout=0.3, pairs=True, max_length=256)

    def numbers(split):
        return [int(tokenizer.decode(parts[0].ids).partition("What is ")[2].split()[0]) for _, parts in split.units()]

    train, held_out = numbers(made["train"]), numbers(made["heldout"])
    assert len({*held_out}) * 4 == len(held_out) > 4
    assert len({*train}) * 4 == len(train)
    assert {*numbers(compared["heldout"])} == {*held_out}
    assert {*numbers(compared["train"])} == {*train}


def test_a_limit_takes_that_many_rows(write, ready):
    folder = write({"a.jsonl": lines([*ROWS, {"instruction": "x"}])})
    with pytest.raises(ValueError, match="line 61"):
        ready(folder, limit=7)
    whole, part = (encodings(ready(folder, limit=n, skip_bad_lines=True)["train"]) for n in (None, 7))
    assert len(part) == 7
    assert part == [example for example in whole if example in part]
    assert part != whole[:7]
    assert len(encodings(ready(folder, limit=100, skip_bad_lines=True)["train"])) == 60


@pytest.mark.filterwarnings("ignore:.*held-out side")
@pytest.mark.parametrize(
    "change",
    [
        {"bytes": True}, {"limit": 50}, {"holdout": 0.4}, {"template": "plain"}, {"max_length": 127}, {"pairs": True},
        {"too_long": "truncate"}, {"skip_bad_lines": True}, {"seed": 1}, {"tokenizer": True},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_all_that_determines_the_examples_is_in_the_name(change, write, tokenizer, tmp_path):
    rows = [row | pair for row, pair in zip(ROWS, PAIRS, strict=True)]

    def name(tokenizer=tokenizer, **options):
        options = {"holdout": 0.3, "template": "solar", "max_length": 128, **options}
        source = Source(str(tmp_path / "text/a.jsonl"), limit=options.pop("limit", None))
        return prepare(source, tokenizer, tmp_path / "cache", workers=1, **options).name

    write({"a.jsonl": lines(rows)})
    before = name()
    assert name() == before
    if change.pop("bytes", False):
        write({"a.jsonl": lines([*rows[1:], rows[0]])})
    if change.pop("tokenizer", False):
        (tmp_path / "tokenizer_config.json").write_text("{}")
        shutil.copy(tokenizer.path, tmp_path / "tokenizer.model")
        change["tokenizer"] = other = Tokenizer(tmp_path)
        other.eos_id = 5
    assert name(**change) != before


def test_workers_change_nothing(write, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "GROUP_BYTES", 500)
    monkeypatch.setattr(shards, "BYTES_PER_WORKER", 100)
    source = Source(str(write({"a.jsonl": lines(PAIRS)})))
    one, two = (
        prepare(source, tokenizer, tmp_path / str(n), 0.2, "solar", 90, True, "drop", workers=n) for n in (1, 2)
    )
    assert one.name == two.name
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in os.listdir(one))
    Manifest(one, examples.PAIRS).verify()


def test_keys_tell_contents_apart(write, ready):
    made = ready(write({"a.jsonl": lines(ROWS)}), holdout=0.3)
    again = ready(write({"b.jsonl": lines(ROWS)}, "other"), holdout=0.3)
    assert made["train"].key() == again["train"].key() != made["heldout"].key()
    other = ready(write({"b.jsonl": lines(ROWS[::-1])}, "other"), holdout=0.3)
    assert other["train"].key() != made["train"].key()


def test_the_first_id_is_never_learned(write, tokenizer, tmp_path):
    """Without BOS a first id may hold both the question's end and the answer's beginning; nothing stands before it."""

    class Merged(Tokenizer):
        def encode_with_offsets(self, text):
            return [7, 9], [(0, len(text)), (len(text) - 1, len(text))]

        def __reduce__(self):
            return Merged, (self.path,)

    merged = Merged(tokenizer.path)
    merged.adds_bos = False
    made = prepare(Source(str(write({"a.jsonl": lines(ROWS)}))), merged, tmp_path, 0.0, "plain", 64, workers=1)
    example = Chats(made, "train", tokenizer.vocab_size).example(0)[0]
    assert example.ids.tolist() == [7, 9, tokenizer.eos_id]
    assert example.learned.tolist() == [False, True, True]
    assert np.issubdtype(example.ids.dtype, np.int64)
    assert Path(made).is_dir()
