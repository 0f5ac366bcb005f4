"""Windows: what is counted, what stands before it, and which bytes it stands for."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solar.tokenizer import Tokenizer
from solar.windows import batches, collate, cut, deal, encode, read_texts, windows_of

ASSETS = "solar/assets/base"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(ASSETS)


def numbered(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids that say where they stand, of as many bytes."""
    return np.arange(length), np.arange(length)


@given(length=st.integers(0, 60), window=st.integers(2, 20), stride=st.integers(1, 20))
def test_every_token_is_counted_once_with_what_stands_before_it(length, window, stride):
    stride = min(stride, window)
    found = cut(*numbered(length), window, stride)
    counted = [i for w in found for i in w.ids[len(w.ids) - w.counted :]]
    cannot = {0} if stride < window else set(range(0, length, window))  # nothing stands before them
    assert counted == [i for i in range(length) if i not in cannot]
    for w in found:
        assert len(w.ids) <= window
        assert list(w.ids) == list(range(w.ids[0], w.ids[0] + len(w.ids)))
        assert w.nbytes == sum(w.ids[len(w.ids) - w.counted :])
        context = len(w.ids) - w.counted
        assert context >= min(window - stride, w.ids[-w.counted]) or stride == window
    assert [w.block for w in found] == [w.ids[-w.counted] // window for w in found]


def test_a_stride_of_a_window_gives_windows_that_do_not_overlap():
    found = cut(*numbered(1100), 512, 512)
    assert [(w.ids[0], len(w.ids), w.counted) for w in found] == [(0, 512, 511), (512, 512, 511), (1024, 76, 75)]


def test_strides_that_cannot_be_are_refused():
    for window, stride, what in ((1, 1, "--window 1"), (8, 0, "--stride 0"), (8, 9, "--stride 9")):
        with pytest.raises(ValueError, match=what):
            cut(*numbered(20), window, stride)


@pytest.mark.parametrize("text", ["plain words", " two  spaces\n\n", "naïve Ω 漢字 🜂🜂", "", "\t", "🜂"])
def test_the_bytes_of_a_text_are_shared_out_among_its_tokens(tokenizer, text):
    ids, nbytes = encode(tokenizer, text)
    assert list(ids) == tokenizer.encode(text, bos=False)
    assert nbytes.sum() == (len(text.encode()) if len(ids) else 0)
    assert (nbytes >= 0).all()


def test_plain_tokens_have_the_bytes_that_they_spell(tokenizer):
    text = "def f(a):\n    return a + 1\n"
    ids, nbytes = encode(tokenizer, text)
    spelled = [len(tokenizer.token_bytes(i)) for i in ids]
    assert list(nbytes[1:]) == spelled[1:]
    assert nbytes[0] == spelled[0] - (sum(spelled) - len(text))  # the dummy space before the first


def test_bos_lets_the_first_token_count(tokenizer):
    text = "All of it.\n"
    (without,), (with_it,) = (windows_of(tokenizer, [text], 64, 32, bos) for bos in (False, True))
    assert with_it.counted == without.counted + 1 == len(tokenizer.encode(text, bos=False))
    assert with_it.nbytes == len(text)


def test_only_so_many_tokens_are_taken(tokenizer):
    texts = ["one two three four five\n"] * 3
    for bos in (False, True):
        found = windows_of(tokenizer, texts, 64, 32, bos, tokens=len(tokenizer.encode(texts[0], bos=False)) + 3)
        assert [w.counted for w in found] == [len(tokenizer.encode(texts[0], bos=False)) - (not bos), 3 - (not bos)]
    with pytest.raises(ValueError, match="at least 2 tokens"):
        windows_of(tokenizer, texts, 64, 32, False, tokens=1)


def test_blocks_of_texts_do_not_mix(tokenizer):
    found = windows_of(tokenizer, ["abc def\n" * 40, "ghi\n", "abc def\n" * 40], 16, 8, True)
    of_each = [len(tokenizer.encode(t)) for t in ("abc def\n" * 40, "ghi\n")]
    assert found[-1].block + 1 == len({w.block for w in found})
    assert [w.block for w in found] == sorted(w.block for w in found)
    assert len({w.block for w in found}) == 2 * -(-of_each[0] // 16) + 1


def test_batches_hold_every_window_and_no_more_than_they_may():
    windows = [cut(*numbered(length), 64, 64)[0] for length in (3, 64, 10, 40, 64, 5, 2)]
    found = batches(windows, 128)
    assert sorted(itertools.chain(*found)) == list(range(7))
    for batch in found:
        assert len(batch) * max(len(windows[i].ids) for i in batch) <= 128
    assert len(windows[found[0][0]].ids) == 64
    assert [len(batch) for batch in batches(windows, 1)] == [1] * 7  # one that is too long goes alone


def test_windows_side_by_side():
    windows = [cut(*numbered(6), 4, 2)[1], cut(*numbered(3), 4, 2)[0]]
    batch = collate(windows)
    assert batch.ids.tolist() == [[2, 3, 4, 5], [0, 1, 2, 0]]
    assert batch.labels.tolist() == [[-100, -100, 4, 5], [-100, 1, 2, -100]]
    assert batch.real.tolist() == [[True] * 4, [True, True, True, False]]
    assert batch.ids.dtype == torch.int64


def test_samples_share_no_window_and_are_dealt_from_all_sources(tokenizer):
    texts = {name: "".join(f"{name} {i}\n" for i in range(400)) for name in ("apple", "pear")}
    sources = [(name, iter([text])) for name, text in texts.items()]
    samples = deal(sources, tokenizer, 32, False, [100, 200])
    for sample, size in zip(samples, (100, 200), strict=True):
        assert size <= sum(w.counted for w in sample) < size + 32
    windows = [w for sample in samples for w in sample]
    of = {name: [w for w in windows if name in tokenizer.decode(w.ids.tolist())] for name in texts}
    assert abs(len(of["apple"]) - len(of["pear"])) <= 1
    for name, text in texts.items():  # one behind the other, so none is used twice
        ids = np.concatenate([w.ids for w in of[name]])
        assert list(ids) == tokenizer.encode(text, bos=False)[: len(ids)]
    assert [w.block for w in samples[1]] == list(range(len(samples[1])))
    with pytest.raises(ValueError, match=r"apple: [\d,]+ tokens in all, 90,000 are wanted"):
        deal([("apple", iter([texts["apple"]]))], tokenizer, 32, False, [90_000])
    (whole,) = deal([("apple", iter([texts["apple"]]))], tokenizer, 32, False, [90_000], fewer=True)
    assert sum(len(w.ids) for w in whole) == len(tokenizer.encode(texts["apple"], bos=False))
    with pytest.raises(ValueError, match="empty: 0 tokens in all"):
        deal([("empty", iter(["", " "]))], tokenizer, 32, False, [5], fewer=True)


def test_what_files_hold_is_read_as_texts(write):
    folder = write({"a.txt": "one\n\ntwo\n", "b.jsonl": '{"text": "x"}\n{"text": "y"}\n', ".hidden": b"\0"})
    read = {name.rpartition("/")[2]: list(found) for name, found in read_texts(str(folder))}
    assert read == {"a.txt": ["one\n\ntwo\n"], "b.jsonl": ["x", "y"]}
    ((name, long),) = read_texts(str(write({"long.txt": "word " * 200_000}, "other") / "long.txt"))
    assert [len(text) for text in long] == [1_000_000], name  # one text, however corpora are cut
    bad = write({"bad.txt": b"fine\n\xff\n"}, "bad")
    with pytest.raises(ValueError, match=r"bad\.txt, line 2: byte 0xff is not UTF-8"):
        [list(found) for _, found in read_texts(str(bad / "bad.txt"))]
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_texts(str(bad / "gone.txt"))


def test_of_the_built_in_corpora_what_was_held_out_is_read():
    ((_, problems),) = read_texts("problems")
    ((_, sources),) = read_texts("stdlib")
    assert all(isinstance(text, str) and text for text in itertools.islice(problems, 5))
    assert next(sources)
