"""Perplexity against the log-likelihood of one pass, and its errors against what they claim."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from solar import perplexity as measured
from solar.checkpoint import load_model
from solar.perplexity import Options, Perplexity, perplexity, ratio_error, report, score, total
from solar.tokenizer import Tokenizer
from solar.windows import cut, encode, windows_of

ASSETS = measured.BASE
TEXT = "import os\n\n\ndef walk(path):\n    for name in sorted(os.listdir(path)):\n        yield name\n" * 2


@pytest.fixture(scope="module")
def model():
    return load_model(ASSETS, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(ASSETS)


def one_pass(model, ids) -> torch.Tensor:
    """-log p of each token but the first, by a softmax over all logits."""
    with torch.inference_mode():
        logps = model(torch.tensor([list(ids)]))[0, :-1].double().log_softmax(-1)
    return -logps.gather(1, torch.tensor(list(ids))[1:, None])[:, 0]


@pytest.mark.parametrize("stride", [1, 100, 400])
def test_a_text_within_one_window_costs_what_one_pass_says(model, tokenizer, stride):
    found = perplexity(model, tokenizer, [TEXT], window=400, stride=stride)
    ids = tokenizer.encode(TEXT)
    truth = one_pass(model, ids)
    assert found.tokens == len(ids) - 1
    assert found.nbytes == len(TEXT)  # BOS stands for none
    assert found.nats == pytest.approx(truth.sum().item(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(truth.mean()), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(truth.sum().item() / math.log(2) / len(TEXT), rel=1e-6)
    assert math.isnan(found.loss_error)  # one block has none


def test_sliding_windows_give_each_token_its_context(model, tokenizer):
    """By hand: token i is predicted in the first window that reaches it."""
    text = TEXT[:100]
    ids, nbytes = encode(tokenizer, text)
    window, stride = 16, 5
    found = total(windows := cut(ids, nbytes, window, stride), score(model, windows, batch_tokens=100))
    costs = []
    for i in range(1, len(ids)):
        start = max(-(-(i + 1 - window) // stride), 0) * stride
        costs.append(one_pass(model, ids[start : i + 1])[-1].item())
    assert found.tokens == len(costs) == len(ids) - 1
    assert found.nats == pytest.approx(sum(costs), rel=1e-6)
    assert found.nbytes == len(text) - nbytes[0]


def test_a_stride_of_a_window_is_disjoint_windows(model, tokenizer):
    ids, nbytes = encode(tokenizer, TEXT)
    found = total(windows := cut(ids, nbytes, 32, 32), score(model, windows))
    apart = [one_pass(model, ids[at : at + 32]).sum().item() for at in range(0, len(ids), 32) if at + 1 < len(ids)]
    assert found.nats == pytest.approx(sum(apart), rel=1e-6)
    assert found.blocks[:, 0].tolist() == pytest.approx(apart, rel=1e-5)


def test_what_shares_a_batch_changes_nothing(model, tokenizer):
    windows = windows_of(tokenizer, [TEXT, "x = 1\n", TEXT[:200]], 50, 20, True)
    alone, together = (score(model, windows, batch_tokens=n) for n in (1, 10_000))
    np.testing.assert_allclose(alone, together, rtol=1e-5)
    counted = []
    score(model, windows, 128, counted.append)
    assert sum(counted) == sum(w.nbytes for w in windows)


def test_standard_errors_are_those_of_the_mean():
    """With blocks of one size the ratio is a mean, and its error the usual one; with others, what resampling gives."""
    draw = np.random.default_rng(0)
    costs = draw.normal(3, 1, 50)
    assert ratio_error(costs * 8, np.full(50, 8)) == pytest.approx(costs.std(ddof=1) / math.sqrt(50))
    sizes = draw.integers(4, 12, 400).astype(float)
    tops = sizes * draw.normal(3, 0.5, 400) + draw.normal(0, 1, 400)
    picks = draw.integers(400, size=(2000, 400))
    resampled = tops[picks].sum(1) / sizes[picks].sum(1)
    assert ratio_error(tops, sizes) == pytest.approx(resampled.std(), rel=0.06)
    assert math.isnan(ratio_error(costs[:1], costs[:1]))


def test_two_models_on_one_text_are_compared_block_by_block():
    draw = np.random.default_rng(1)
    hard = draw.normal(300, 50, 30)
    one, other = (Perplexity(np.stack([hard + more, np.full(30, 100.0), np.full(30, 400.0)], 1)) for more in (0.0, 5.0))
    more, error = other.over(one)
    assert more == pytest.approx(0.05)
    assert error < 1e-9 < one.loss_error


def test_what_is_not_finite_is_said_to_be_so():
    broken = Perplexity(np.array([[1e9, 10, 40], [1e9, 10, 40.0]]))
    assert broken.perplexity == math.inf
    assert broken.to_json()["perplexity"] is None
    json.dumps(Perplexity(np.array([[math.nan, 10, 40.0]])).to_json(), allow_nan=False)


def test_the_command_compares_plans_file_by_file(write, capsys, tmp_path):
    folder = write({"a.txt": TEXT, "b.txt": "Ann has 3 pens.\n" * 9})
    out = tmp_path / "report.json"
    options = Options(files=[str(folder)], plan=["dus", "expand"], window=64, stride=32, out=str(out))
    result = report(options)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(out)
    assert json.loads(out.read_text()) == result
    base, dus, expand = result["rows"]
    assert [row["layers"] for row in result["rows"]] == [12, 18, 15]
    assert base["files"].keys() == {str(folder / "a.txt"), str(folder / "b.txt")}
    assert base["bytes"] == sum(part["bytes"] for part in base["files"].values()) == len(TEXT) + 9 * 16
    assert base["nats"] == pytest.approx(expand["nats"], rel=1e-6)  # identity layers compute nothing
    alone = perplexity(load_model(ASSETS, "float32", plan="dus"), Tokenizer(ASSETS), [TEXT], 64, 32)
    assert dus["files"][str(folder / "a.txt")]["nats"] == pytest.approx(alone.nats, rel=1e-6)
    assert "nats a token more" in printed
    assert report(dataclasses.replace(options, tokens=20, plan=[], bos="no", out=None))["rows"][0]["tokens"] == 38


def test_options_that_cannot_be_are_one_line(write, tmp_path):
    path = str(write({"a.txt": TEXT, "short.txt": "a", "bad.txt": "a\x00"}) / "a.txt")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / ".hidden").write_text(TEXT)
    for options, what in (
        ({"window": 5000}, r"--window 5000: .* has room for 4096 positions"),
        ({"window": 2000, "plan": ["dus"]}, "--window 2000: .* has room for 1024 positions"),
        ({"stride": 2000}, "--stride 2000: must be from 1 to the window of 1024"),
        ({"stride": 0}, "^--stride 0: must be from 1 to the window of 1024"),
        ({"window": 0}, "^--window 0: at least 2 tokens"),
        ({"device": "cuda:99"}, r"^--device cuda:99: there is none here \(.*\w\)$"),
        ({"device": "nonsense"}, "^--device nonsense: must be auto, cpu"),
        ({"files": [path.replace("a.txt", "bad.txt")]}, r"^\S*bad\.txt, line 1: a NUL byte"),
        ({"files": [str(tmp_path / "none")]}, "^.*/none: no file in this directory; hidden ones"),
        ({"tokens": 0}, "--tokens 0: at least 1"),
        ({"plan": ["dus:40"]}, "M = 40 does not fit"),
        ({"files": [path.replace("a.txt", "short.txt")], "bos": "no"}, r"short\.txt: no token to count"),
    ):
        with pytest.raises(ValueError, match=what):
            report(Options(**({"files": [path]} | options)))
