"""Reference log-probabilities: the same however they are batched, packed and shared out; kept, resumed and refused."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from solar import base, cli, dist, examples, problems, reference
from solar.checkpoint import CheckpointReader, load_model, save_model
from solar.config import ModelConfig
from solar.corpus import Source
from solar.examples import Example, collate
from solar.logps import FORMAT, Writer, default_path
from solar.losses import pair_logps, preference_loss
from solar.model import Transformer
from solar.packed import PairBatches
from solar.reference import easy_to_hard, read_reference, score
from solar.tokenizer import Tokenizer
from tests.golden import tiny
from tests.test_losses import TRL, golden_model

ROOT = Path(__file__).resolve().parent.parent


class Stored:
    """Pairs that lie in a list."""

    def __init__(self, pairs: list[list[Example]]):
        self.pairs, self.example = pairs, pairs.__getitem__

    def __len__(self):
        return len(self.pairs)

    def lengths(self):
        return np.array([sum(len(text.ids) for text in pair) for pair in self.pairs])


def text(prompt: list[int], answer: list[int]) -> Example:
    return Example(np.array(prompt + answer), np.arange(len(prompt) + len(answer)) >= len(prompt))


@pytest.fixture
def world():
    world = dist.setup("cpu")
    yield world
    dist.close()


@pytest.fixture(scope="module")
def model():
    return golden_model(TRL["seeds"]["reference"])


@pytest.fixture(scope="module")
def pairs():
    """40 pairs of uneven lengths, the first six of them those of TRL."""
    made = [
        [text(pair["prompt_ids"], pair["chosen_ids"]), text(pair["prompt_ids"], pair["rejected_ids"])]
        for pair in TRL["pairs"]
    ]
    for i in range(len(made), 40):
        draw = lambda part, length, i=i: tiny.token_ids(i, part, (length,), 97).tolist()
        prompt = draw("prompt", 1 + 5 * i % 17)
        made.append([text(prompt, draw("chosen", 1 + 7 * i % 23)), text(prompt, draw("rejected", 1 + 3 * i % 11))])
    return Stored(made)


def table_of(model, pairs, world, sequence_length=90, batch_size=4) -> np.ndarray:
    table = np.full((len(pairs), 2), math.nan)
    for results in score(model, pairs, sequence_length, batch_size, world):
        for index, *values in results:
            assert np.isnan(table[index]).all()
            table[index] = values
    return table


@pytest.fixture(scope="module")
def alone(model, pairs) -> np.ndarray:
    """(N, 2): every text by a pass of its own, without padding and without documents."""
    table = np.empty((len(pairs), 2))
    for i, pair in enumerate(pairs.pairs):
        for side, (ids, learned) in enumerate(pair):
            logps = model(torch.from_numpy(ids)[None])[0].double().log_softmax(-1)
            table[i, side] = sum(logps[t - 1, ids[t]].item() for t in range(1, len(ids)) if learned[t])
    return table


@pytest.mark.parametrize(("sequence_length", "batch_size"), [(90, 1), (90, 4), (200, 2), (500, 50)])
def test_values_depend_on_neither_batch_size_nor_packing(sequence_length, batch_size, model, pairs, world, alone):
    found = table_of(model, pairs, world, sequence_length, batch_size)
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_values_are_those_of_trl(model, pairs, world):
    found = table_of(model, Stored(pairs.pairs[:6]), world)
    np.testing.assert_allclose(found[:, 0], TRL["reference"]["chosen"], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], TRL["reference"]["rejected"], rtol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model, pairs, alone):
    first = pairs.pairs[:8]
    batch = collate(first, max(sum(len(text.ids) for text in pair) for pair in first))
    shift = [int((row != 2).sum()) for row in batch["document_ids"]]
    left = {name: torch.stack([r.roll(-n) for r, n in zip(x, shift, strict=True)]) for name, x in batch.items()}
    assert (left["document_ids"][:, 0] == 2).sum() == 7  # padded, all but the longest
    chosen, rejected = pair_logps(model(**left), left["document_ids"], 1)
    np.testing.assert_allclose(torch.cat([chosen, rejected], 1), alone[:8], rtol=1e-5)


def test_global_random_states_stay_as_they_are(model, pairs, world):
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    table_of(model, pairs, world)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()


# ------------------------------------------------------------------------------------------------ the file

HEADER = {"format": FORMAT, "model": "a", "tokenizer": "b", "data": "c", "template": "solar", "pairs": 3}
ROWS = [(0, -1.25, -math.pi), (2, -1e-30, -4000.000000001), (1, 0.0, -7.0)]


@pytest.fixture
def written(tmp_path):
    """A complete file of three pairs."""
    writer = Writer(tmp_path / "pairs.ref.jsonl", HEADER)
    writer.add(ROWS[:2])
    assert not writer.path.exists()
    writer.add(ROWS[1:])
    writer.publish()
    writer.close()
    return writer.path


def test_what_is_written_is_read_to_the_last_bit(written):
    table = read_reference(written, {"model": "a", "data": "c"})
    assert table.tolist() == [list(values) for _, *values in sorted(ROWS)]
    assert [path.name for path in written.parent.iterdir()] == ["pairs.ref.jsonl"]
    assert json.loads(written.read_text().splitlines()[0]) == HEADER


@pytest.mark.parametrize("name", ["model", "tokenizer", "data", "template", "pairs"])
def test_what_differs_is_said_with_both_values_and_the_command(name, written):
    with pytest.raises(ValueError) as error:
        read_reference(written, HEADER | {name: "other"}, "python -m solar.reference --model m")
    said = str(error.value)
    assert f"{name} {HEADER[name]}, wanted is other" in said
    assert said.endswith("make it again:  python -m solar.reference --model m")
    assert "\n" not in said


@pytest.mark.parametrize("data", ["a/pairs.v1.jsonl", "a/pairs.v1.json", "a/pairs.v1/"])
def test_a_file_lies_beside_its_pairs(data):
    assert default_path(data) == Path("a/pairs.v1.ref.jsonl")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file; .* made by  python -m solar.reference"):
        read_reference(tmp_path / "x", {})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda lines: lines[:3], "line 4: damaged, 1 of 3 pairs are missing"),
        (lambda lines: [*lines[:3], lines[3][:20]], "line 4: damaged, 1 of 3 pairs are missing"),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], "line 3: damaged, 2 of 3 pairs are missing"),
        (lambda lines: [*lines, lines[1]], "line 5: damaged, something is left over"),
        (lambda lines: [*lines[:2], lines[2].replace(b"-7.0", b"NaN"), lines[3]], "line 3: damaged, 2 of 3"),
        (lambda lines: [*lines[:2], lines[2].replace(b"-7.0", b"true"), lines[3]], "line 3: damaged, 2 of 3"),
        (lambda lines: [*lines[:2], lines[2].replace(b"1", b"9"), lines[3]], "line 3: damaged, 2 of 3"),
        (lambda lines: [b"[]\n", *lines[1:]], "line 1: no file of reference log-probabilities"),
        (lambda lines: [lines[0].replace(b"version 1", b"version 2"), *lines[1:]], "line 1: no file of"),
        (lambda lines: [lines[0].replace(b": 3", b": -3"), *lines[1:]], 'line 1: "pairs" is -3'),
    ],
)
def test_a_damaged_file_is_refused(spoil, said, written):
    written.write_bytes(b"".join(spoil(written.read_bytes().splitlines(keepends=True))))
    with pytest.raises(ValueError, match=re.escape(said)):
        read_reference(written, {})


def test_a_file_that_is_not_finished_is_gone_on_with(tmp_path):
    path = tmp_path / "deep/pairs.ref.jsonl"
    writer = Writer(path, HEADER)
    writer.add(ROWS[:1])
    writer.close()
    with open(writer.partial, "ab") as file:
        file.write(b'{"pair": 2, "chosen": -1.0, "rej')  # the run was killed here
    again = Writer(path, HEADER)
    assert again.table[0].tolist() == [-1.25, -math.pi]
    assert np.isnan(again.table[1:]).all()
    again.add(ROWS)
    again.publish()
    again.close()
    assert read_reference(path, HEADER)[2].tolist() == [-1e-30, -4000.000000001]
    other = Writer(path, HEADER)
    other.add(ROWS)
    other.close()
    different = Writer(path, HEADER | {"model": "z"})
    assert np.isnan(different.table).all()
    assert different.partial.read_bytes().count(b"\n") <= 1
    with pytest.raises(ValueError, match="being written by another process"):
        Writer(path, HEADER)
    different.close()


@pytest.mark.parametrize("cut", range(1, 45))
def test_a_file_that_ends_anywhere_is_gone_on_with(cut, tmp_path):
    writer = Writer(tmp_path / "pairs.ref.jsonl", HEADER)
    writer.add(ROWS[:2])
    writer.close()
    content = writer.partial.read_bytes()[:-cut]
    writer.partial.write_bytes(content)
    again = Writer(writer.path, HEADER)
    assert again.partial.read_bytes() == content[: content.rfind(b"\n") + 1]
    again.add(ROWS)
    again.publish()
    again.close()
    assert read_reference(writer.path, HEADER)[[0, 2, 1]].tolist() == [[*row[1:]] for row in ROWS]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_written(bad, tmp_path):
    writer = Writer(tmp_path / "pairs.ref.jsonl", HEADER)
    with pytest.raises(ValueError, match=r"pair 1: log-probabilities -1.0 \(chosen\) and .* nothing to learn"):
        writer.add([(0, -1.0, -1.0), (1, -1.0, bad)])
    writer.close()
    assert writer.partial.read_bytes().count(b"\n") == 1
    assert not writer.path.exists()


# ------------------------------------------------------------------------------------------------ chunks


def test_chunks_are_ordered_from_easy_to_hard():
    """A tie counts as wrong; among equal accuracies the larger gamma comes first."""
    tables = {
        "half": [[-1.0, -2.0], [-3.0, -1.0]],
        "tie": [[-1.0, -1.0], [-1.0, -1.0]],
        "all": [[-1.0, -1.1], [-1.0, -9.0], [-2.0, -3.0]],
        "half, clearer": [[-1.0, -5.0], [-3.0, -1.0]],
    }
    eases = {name: reference.ease(np.array(table)) for name, table in tables.items()}
    assert eases["half"] == (0.5, -0.5, 2)
    assert eases["tie"] == (0.0, 0.0, 2)
    assert easy_to_hard(eases) == ["all", "half, clearer", "half", "tie"]


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """Two tiny models with a tokenizer, and three files of pairs; widths that two ranks cannot share evenly."""
    here = tmp_path_factory.mktemp("reference")
    config = ModelConfig(
        model_type="llama", vocab_size=384, hidden_size=30, intermediate_size=45, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=10, max_position_embeddings=256, torch_dtype="float32",
    )  # fmt: skip
    tokenizer = base.train_tokenizer(list(problems.documents(0, 300, "train")), config.vocab_size)
    for name, seed in (("model", 0), ("other", 1)):
        model = Transformer(config)
        model.init_weights(seed)
        save_model(model, here / name, companions={"tokenizer.model": tokenizer})
    for name, count in (("pairs", 60), ("few", 20)):
        rows = [
            {
                "prompt": f"How many are {i} and {7 * i}?",
                "chosen": f"{8 * i} are it." + i % 5 * " Yes!",
                "rejected": "No.",
            }
            for i in range(count)
        ]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (here / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    return here


@pytest.fixture
def options(workplace, tmp_path):
    """Makes the command's options; what it writes lies in the test's own directory."""

    def make(**changed) -> reference.Options:
        settings = {
            "data": [str(workplace / "pairs.jsonl")],
            "model": str(workplace / "model"),
            "out": str(tmp_path / "ref.jsonl"),
            "sequence_length": 160,
            "batch_size": 4,
            "holdout": 0.2,
            "data_cache": str(workplace / "cache"),
            "workers": 1,
            "device": "cpu",
        }
        return reference.Options(**(settings | changed))

    return make


def values(path) -> np.ndarray:
    return read_reference(path, {})


def both_splits(options: reference.Options) -> reference.BothSplits:
    tokenizer = Tokenizer(options.model)
    directory = examples.prepare(
        Source(options.data[0]), tokenizer, Path(options.data_cache), options.holdout, options.template,
        options.sequence_length, pairs=True, workers=1,
    )  # fmt: skip
    return reference.BothSplits(directory, tokenizer.vocab_size)


@torch.no_grad()
def test_the_file_holds_what_the_model_says_of_every_pair(options, capsys):
    made = options()
    reference.run(made)
    pairs, model = both_splits(made), load_model(made.model)
    assert 0 < pairs.trained < len(pairs) == 60
    for i, found in enumerate(values(made.out)):
        for (ids, learned), value in zip(pairs.example(i), found, strict=True):
            ids, learned = torch.from_numpy(ids), torch.from_numpy(learned)
            logps = model(ids[None], labels=ids.where(learned, -100)[None])
            assert value == pytest.approx(logps.double().sum().item(), rel=1e-5)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("pairs       60 of ")
    assert said[-1] == made.out


def test_a_file_that_is_up_to_date_is_left_alone_and_no_model_is_loaded(options, capsys, monkeypatch):
    reference.run(options())
    before = os.stat(options().out).st_mtime_ns
    monkeypatch.delattr(reference, "build")
    reference.run(options(batch_size=1))  # which decides nothing
    assert f"up to date  {options().out}" in capsys.readouterr().out
    assert os.stat(options().out).st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "other"}, "model "),
        ({"template": "plain"}, "template solar, wanted is plain"),
        ({"sequence_length": 150}, "sequence_length 160, wanted is 150"),
        ({"holdout": 0.3}, "holdout 0.2, wanted is 0.3"),
        ({"dtype": "bf16"}, "dtype float32, wanted is bfloat16"),
    ],
    ids=str,
)
def test_what_was_made_of_something_else_is_computed_again(change, said, options, workplace, capsys):
    reference.run(options())
    before = values(options().out)
    if "model" in change:
        change = {"model": str(workplace / change["model"])}
    reference.run(options(**change))
    assert re.search(f"computing   .*ref.jsonl; .* was made with {said}", capsys.readouterr().out)
    assert np.array_equal(values(options().out), before) == ("sequence_length" in change)  # which here cuts nothing


def test_a_run_that_is_stopped_goes_on_and_ends_with_the_same_bytes(options, tmp_path, monkeypatch, capsys):
    reference.run(options(out=str(tmp_path / "whole.jsonl")))
    add, calls = Writer.add, []

    def stopping(self, results):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(results))
        return add(self, results)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            reference.run(options())
    assert not Path(options().out).exists()
    score, scored = reference.score, []
    monkeypatch.setattr(reference, "score", lambda *args: (scored.append(len(r)) or r for r in score(*args)))
    reference.run(options())
    assert sum(scored) == 60 - sum(calls)
    assert f"going on    {options().out}.partial has {sum(calls)} of 60 pairs already" in capsys.readouterr().out
    assert Path(options().out).read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ref.jsonl", "whole.jsonl"]


def test_a_run_that_goes_on_with_other_batches_keeps_what_there_is(options, tmp_path):
    whole = tmp_path / "whole.jsonl"
    reference.run(options(out=str(whole)))
    lines = whole.read_bytes().splitlines(keepends=True)
    kept = [b'{"pair": %d, "chosen": -%d.5, "rejected": -2.25}\n' % (i, i) for i in range(4, 29)]
    (tmp_path / "ref.jsonl.partial").write_bytes(b"".join([lines[0], *kept, lines[31][:-5]]))
    reference.run(options(batch_size=3))
    assert Path(options().out).read_bytes().splitlines(keepends=True)[5:30] == kept
    np.testing.assert_allclose(values(options().out)[29:], values(whole)[29:], rtol=1e-5)


def test_what_is_left_out_is_told(options, workplace, tmp_path, capsys):
    rows = (workplace / "few.jsonl").read_text()
    long = json.dumps({"prompt": "Why?", "chosen": "So. " * 200, "rejected": "No."})
    (tmp_path / "some.jsonl").write_text(rows + long + '\n{"prompt": "Why?", "chosen": "So."}\n')
    with pytest.raises(ValueError, match=r"some.jsonl, line 22: no 'rejected'"):
        reference.run(options(data=[str(tmp_path / "some.jsonl")]))
    reference.run(options(data=[str(tmp_path / "some.jsonl")], skip_bad_lines=True))
    said = capsys.readouterr().out
    assert "pairs       20 of " in said
    assert re.search(r"dropped, longer than 160 tokens: 1 \(first: .*line 21\)", said)
    assert re.search(r"no 'rejected': 1 \(first: .*line 22\)", said)


def test_two_ranks_share_the_rows(options, tmp_path):
    reference.run(options())
    flags = cli.command_line(options(out=str(tmp_path / "two.jsonl")), "")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "solar.reference", *shlex.split(flags)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "two.jsonl")
    np.testing.assert_allclose(values(tmp_path / "two.jsonl"), values(options().out), rtol=1e-5)


def test_chunks_are_ranked_and_nothing_is_written(options, workplace, capsys):
    before = sorted(workplace.iterdir())
    files = [str(workplace / f"{name}.jsonl") for name in ("swapped", "pairs", "few")]
    reference.run(options(data=files, out=None, rank_chunks=True))
    said = capsys.readouterr().out.splitlines()
    assert sorted({*workplace.iterdir()} - {workplace / "cache"}) == [path for path in before if path.name != "cache"]
    accuracy = {
        line.split(":")[0]: float(re.search(r"accuracy ([\d.]+)%", line)[1]) for line in said if "gamma" in line
    }
    order = said[-1].split()
    assert sorted(order) == sorted(files)
    assert order == sorted(order, key=accuracy.get, reverse=True)
    assert accuracy[files[0]] + accuracy[files[2]] == pytest.approx(100)  # the same pairs, the other way round


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 0}, "--batch-size 0: at least 1 is needed"),
        ({"sequence_length": 257}, "--sequence-length 257: the model has room for 256 positions"),
        ({"holdout": 1.5}, "--holdout 1.5: a share between 0 and 1"),
        ({"rank_chunks": True}, "--rank-chunks writes nothing; leave it out"),
        ({"data": ["a.jsonl", "b.jsonl"]}, "each of --data has a reference of its own; leave it out"),
        ({"data": ["a.jsonl", "a.jsonl"], "out": None}, "--data a.jsonl is given twice"),
        (
            {"data": ["k.json", "k.jsonl"], "out": None},
            "--data k.json and k.jsonl have one reference file, k.ref.jsonl; rename one of them",
        ),
        ({"data": ["k.jsonl", "./k.jsonl::5"], "out": None}, "--data k.jsonl and ./k.jsonl::5 have one reference file"),
        ({"data": ["k.jsonl"], "out": "./k.jsonl"}, "--out ./k.jsonl is the file of pairs itself"),
        ({"data": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"model": "nowhere"}, "nowhere: no such directory"),
        ({"sequence_length": 8}, "no example in it is left; dropped, longer than 8 tokens: 60"),
        ({"template": "chatml"}, "<|im_start|>"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(change, said, options):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)) as error:
        reference.run(options(**change))
    assert "\n" not in str(error.value)


def test_a_model_that_gives_nan_leaves_no_file(options, workplace, tmp_path):
    model = load_model(workplace / "model")
    broken = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    broken["model.norm.weight"][0] = math.nan
    model.load_state_dict(broken, assign=True)
    save_model(model, tmp_path / "broken", companions=workplace / "model")
    with pytest.raises(ValueError, match=r"pair \d+: log-probabilities nan .* --dtype fp32"):
        reference.run(options(model=str(tmp_path / "broken")))
    assert not Path(options().out).exists()


# ------------------------------------------------------------------------------------------------ training with it


@torch.no_grad()
def test_training_begins_at_ln_2_and_a_wrong_file_names_the_command_that_mends_it(options, workplace):
    made = options(out=None)
    tokenizer, reader, source = Tokenizer(made.model), CheckpointReader(made.model), made.data[0]
    pairs = both_splits(made)
    directory = pairs.parts[0].directory
    ask = lambda: reference.reference_for(None, source, directory, reader, tokenizer, made, torch.float32)
    with pytest.raises(FileNotFoundError, match=r"no such file") as error:
        ask()
    reference.run(options(model=str(workplace / "other"), out=None))
    with pytest.raises(ValueError, match=r"model \w+, wanted is \w+; make it again:  python") as error:
        ask()
    command = shlex.split(str(error.value).partition("make it again:")[2])
    assert command[:3] == ["python", "-m", "solar.reference"]
    extra = ["--data-cache", made.data_cache, "--device", "cpu"]
    reference.run(cli.parse(reference.Options, [*command[3:], *extra], prog="", description=""))
    kept = ask()
    assert {split: table.shape for split, table in kept.items()} == {
        "train": (pairs.trained, 2),
        "heldout": (60 - pairs.trained, 2),
    }
    model = load_model(made.model)
    batches = PairBatches([Source(source)], [directory], 384, 160, 4, seed=3, reference=[kept])
    held_out = [batch for _, found in batches.heldout(4) for batch in found]
    for batch in (batches.batch(0), batches.batch(1), *held_out):
        logps = model(batch["input_ids"], batch["labels"], batch["document_ids"])
        loss, count, sums = preference_loss(logps, batch, beta=0.1)
        assert (loss / count).item() == pytest.approx(math.log(2), abs=1e-6)
        assert sums["gamma_ref"].item() == pytest.approx((sums["logp_chosen"] - sums["logp_rejected"]).item(), rel=1e-4)
    (workplace / "pairs.ref.jsonl").unlink()
