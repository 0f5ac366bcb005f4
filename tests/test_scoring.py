"""Log-likelihoods and greedy answers with shared prompts, against passes over each text as a whole."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solar import scoring, standin, tasks
from solar.base import ASSETS as BASE
from solar.checkpoint import load_model
from solar.model import Transformer
from solar.sampling import generate
from solar.scoring import Limits, Request, branch, common_prefix, encode_request, log_likelihoods, plan, read_trunk
from solar.tokenizer import Tokenizer
from tests.training import CONFIG

pytestmark = pytest.mark.usefixtures("one_thread")
ANY = 1 << 40
NO_LIMITS = Limits(ANY, ANY, ANY)


@pytest.fixture(scope="module")
def tiny():
    model = Transformer(replace(CONFIG, sliding_window=None, max_position_embeddings=512, initializer_range=0.4))
    model.init_weights(3)
    return model


@pytest.fixture(scope="module")
def windowed(tiny):
    """The same weights, of which every layer sees 9 positions."""
    model = Transformer(replace(tiny.config, sliding_window=9))
    model.load_state_dict(tiny.state_dict())
    return model


@torch.inference_mode()
def one_by_one(model, request: Request) -> float:
    """The specification, by another way than the module's: the model's own log-probabilities of labels."""
    ids = torch.tensor([request.ids])
    labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - request.scored, ids, -100)
    return model(ids, labels=labels).double().sum().item()


def answer(model, questions, limits=NO_LIMITS, reuse=True):
    found = [None] * len(questions)
    for batch in plan(questions, limits, reuse=reuse):
        trunk = read_trunk(model, batch.trunk)
        asked = [questions[i] for i in batch.questions]
        for i, logps in zip(batch.questions, log_likelihoods(model, asked, trunk, reuse), strict=True):
            found[i] = logps
    return found


def draw(seed, trunk, questions, vocabulary=300):
    """Questions of random ids: 1 to 4 choices, stems of 0 to 12 ids, continuations of 1 to 9 that may begin alike."""
    rng = torch.Generator().manual_seed(seed)
    integer = lambda low, high: int(torch.randint(low, high + 1, (), generator=rng))
    ids = lambda n: torch.randint(3, vocabulary, (n,), generator=rng).tolist()
    shared, asked = ids(trunk), []
    for _ in range(questions):
        stem, alike = ids(integer(0, 12)), ids(integer(0, 2))
        requests = []
        for _ in range(integer(1, 4)):
            context = shared + stem + ids(integer(0, 3) if stem else 1)
            continuation = alike + ids(integer(1, 7))
            requests.append(Request(context + continuation, len(continuation)))
        asked.append(requests)
    return asked


@pytest.mark.parametrize("which", ["tiny", "windowed"])
@pytest.mark.parametrize("trunk", [0, 1, 20])
def test_every_way_of_sharing_gives_what_whole_texts_give(which, trunk, request):
    model, asked = request.getfixturevalue(which), draw(trunk, trunk, 13)
    expected = [[one_by_one(model, r) for r in question] for question in asked]
    for limits in (
        Limits(1, ANY, ANY),
        Limits(4, ANY, ANY),
        Limits(64, ANY, ANY),
        Limits(64, 30, ANY),
        Limits(64, 99, 300),
    ):
        for reuse in (True, False):
            found = answer(model, asked, limits, reuse)
            for mine, theirs in zip(found, expected, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5)
                assert mine.index(max(mine)) == theirs.index(max(theirs))


def test_single_token_choices_need_no_pass_of_their_own(tiny, monkeypatch):
    context = list(range(5, 40))
    asked = [[Request([*context, last, choice], 1) for choice in (50, 60, 70)] for last in (41, 42)]
    calls = []
    forward = tiny.forward
    monkeypatch.setattr(tiny, "forward", lambda ids, **more: (calls.append(tuple(ids.shape)), forward(ids, **more))[1])
    answer(tiny, asked)
    assert calls == [(1, 35), (2, 1)]


def test_a_trunk_is_read_once_and_a_batch_holds_what_it_may():
    asked = draw(1, 50, 40)
    batches = plan(asked, Limits(8, 60, ANY))
    assert len({id(batch.trunk) for batch in batches}) == 1
    assert len(batches[0].trunk) == 50
    assert sorted(i for batch in batches for i in batch.questions) == list(range(40))
    for batch in batches:
        rows = [request for i in batch.questions for request in asked[i]]
        stems = [common_prefix([request.ids[50:-1] for request in asked[i]]) for i in batch.questions]
        assert len(batch.questions) <= 8
        assert len(stems) * max(stems) <= 60 or len(stems) == 1
        tail = max(len(r.ids) - 51 - n for i, n in zip(batch.questions, stems, strict=True) for r in asked[i])
        assert len(rows) * tail <= 60 or len(stems) == 1
    assert len(plan(asked, Limits(8, 1, ANY))) == 40  # a question alone is always read
    lost = [[request._replace(lost=3) for request in asked[0]], *asked[1:]]
    alone = next(batch for batch in plan(lost, Limits(ANY, ANY, ANY)) if 0 in batch.questions)
    assert alone.trunk == []
    assert alone.questions == [0]


def test_a_branch_goes_on_where_its_row_ended(tiny):
    """Positions and sight of a row do not depend on its neighbours' lengths, nor on what was in memory before."""
    ids = torch.arange(5, 25)[None]
    trunk = read_trunk(tiny, ids[0].tolist())
    cache = branch(tiny, trunk, [0, 0, 0], [20, 7, 1], room=2)
    cache.keys[:, 1, :, :13], cache.values[:, 1, :, :13] = 77.0, -77.0  # where row 1 holds nothing
    logits = tiny(torch.tensor([[40, 41]] * 3), cache=cache)
    for row, n in enumerate((20, 7, 1)):
        whole = torch.cat((ids[:, :n], torch.tensor([[40, 41]])), dim=1)
        torch.testing.assert_close(logits[row], tiny(whole)[0, -2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["tiny", "windowed"])
def test_greedy_answers_are_those_of_generate(which, request):
    model = request.getfixturevalue(which)
    shared = list(range(30, 55))
    prompts = [[*shared, *range(60, 60 + n)] for n in (1, 4, 9, 2, 7)]
    expected = generate(model, prompts, 24)
    for start in (0, 25):
        trunk = read_trunk(model, shared[:start])
        assert scoring.continue_greedily(model, prompts, 24, lambda *_: False, trunk) == expected
    ends = [3, 24, 1, 9, 2]  # rows leave at different steps
    seen = [0] * 5

    def stop(row, token):
        seen[row] += 1
        return seen[row] == ends[row]

    found = scoring.continue_greedily(model, prompts, 24, stop, read_trunk(model, shared))
    assert found == [new[:n] for new, n in zip(expected, ends, strict=True)]


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=5))
def test_common_prefix(sequences):
    n = common_prefix(sequences)
    assert all(sequence[:n] == sequences[0][:n] and len(sequence) >= n for sequence in sequences)
    longer = {tuple(sequence[: n + 1]) for sequence in sequences}
    assert len(longer) > 1 or any(len(sequence) == n for sequence in sequences)


# ------------------------------------------------------------------------------------------------ requests


def test_white_space_before_the_border_belongs_to_the_continuation():
    tok = Tokenizer(BASE)
    request = encode_request(tok, "The answer is \n", "14", True, 4096, None)
    assert (
        request.ids
        == tok.encode("The answer is") + tok.encode("The answer is \n14")[len(tok.encode("The answer is")) :]
    )
    assert tok.decode(request.ids[-request.scored :]) == " \n14".removeprefix(" ")
    known = encode_request(tok, "The answer is \n", "14", True, 4096, tok.encode("The answer is"))
    assert known == request
    assert encode_request(tok, "The answer is", " 14", False, 4096, None).ids[0] != tok.bos_id


def test_a_long_prompt_loses_its_beginning_and_says_so():
    tok = Tokenizer(BASE)
    whole = encode_request(tok, "one two three four five six", " seven", True, 4096, None)
    short = encode_request(tok, "one two three four five six", " seven", True, 8, None)
    assert short.ids == whole.ids[-9:]  # the last one is asked for and not read
    assert short.lost == len(whole.ids) - 9
    assert short.scored == whole.scored
    with pytest.raises(ValueError, match="nothing to score: 0 tokens"):
        encode_request(tok, "one", "", True, 8, None)
    with pytest.raises(ValueError, match="a model that reads 2"):
        encode_request(tok, "one", " two three four five", True, 2, None)


def test_what_is_not_finite_is_an_error():
    model = Transformer(replace(CONFIG, sliding_window=None))
    model.init_weights(0)
    model.lm_head.weight.data[7] = math.nan
    with pytest.raises(ValueError, match=r"not finite in torch\.float32"):
        answer(model, [[Request([5, 6, 7, 8], 2)]])


# ------------------------------------------------------------------------------------------------ the benchmarks


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name != "gsm8k"])
def test_batch_size_and_sharing_change_no_choice_of_the_base(name, tmp_path):
    """Some questions of each benchmark, as they are asked, with the base: its window is shorter than ARC's prompts."""
    standin.write(standin.Options(out=str(tmp_path / "data"), count=6))
    model, tok = load_model(BASE, dtype="fp32"), Tokenizer(BASE)
    few = 2 if tasks.TASKS[name].shots > 5 else 5  # prompts of 25 shots, read whole, take their time
    for group in tasks.load(name, tmp_path / "data", few)[0][-1:]:
        asked = [
            [
                encode_request(tok, before + context, continuation, True, 4096, None)
                for context, continuation in zip(question.contexts, question.continuations, strict=True)
            ]
            for before, question in zip(group.before, group.questions, strict=True)
        ]
        expected = answer(model, asked, Limits(1, ANY, ANY), reuse=False)
        for limits in (Limits(1, ANY, ANY), Limits(4, ANY, ANY), Limits(64, ANY, ANY)):
            found = answer(model, asked, limits)
            for question, mine, theirs in zip(group.questions, found, expected, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5)
                metric = tasks.TASKS[name].metric
                marks = [tasks.mark(metric, question, logps)["choice"] for logps in (mine, theirs)]
                assert marks[0] == marks[1]


def test_greedy_answers_that_overflow_are_an_error(tiny):
    model = Transformer(tiny.config)
    model.load_state_dict(tiny.state_dict())
    (new,) = scoring.continue_greedily(model, [[5, 6]], 4, lambda row, token: False)
    model.model.embed_tokens.weight.data[new[1]] = math.inf  # read in the third step only
    with pytest.raises(ValueError, match=r"not finite in torch\.float32"):
        scoring.continue_greedily(model, [[5, 6]], 4, lambda row, token: False)
