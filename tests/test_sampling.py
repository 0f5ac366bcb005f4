"""Generation against the plainest way to do it: one row, one full pass for every token, and transformers' filters."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import solar.sampling
from solar.config import ModelConfig
from solar.model import KVCache, Transformer
from solar.sampling import Memory, choose_probabilities, generate, penalise_repetition

SMALL = ModelConfig(
    model_type="mistral",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.3,
)
MODELS = {
    "whole": {},
    "window smaller than the prompts": {"sliding_window": 4},
    "window of one": {"sliding_window": 1},
    "window between the prompts": {"sliding_window": 10},
    "one kv head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "attention_bias": True, "rope_theta": 500.0},
}
models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tensors as small as these take longer on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(dtype=torch.float32, seed: int = 0, **changes) -> Transformer:
    model = Transformer(replace(SMALL, **changes))
    model.init_weights(seed)
    return model.to(dtype)


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SMALL.vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def full_pass(model: Transformer, prompt: list[int], new: list[int]) -> torch.Tensor:
    """(len(new), V) logits from which each new token is chosen: no cache, no padding, no batch."""
    return model(torch.tensor([prompt + new[:-1]]))[0, len(prompt) - 1 :].float()


def assert_greedy(model: Transformer, prompt: list[int], new: list[int], slack: float = 1e-4) -> None:
    """Each token is the likeliest, or as near to it as rounding can decide."""
    logits = full_pass(model, prompt, new)
    assert len(logits) == len(new)
    assert (logits[range(len(new)), new] >= logits.amax(dim=-1) - slack).all()


def count_passes(model: Transformer) -> list[tuple[int, ...]]:
    """The shapes of all ids that the model is given from now on."""
    shapes = []
    model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


# ------------------------------------------------------------ greedy


@models
def test_each_token_is_the_likeliest_of_a_full_pass(monkeypatch, changes):
    """A batch of uneven prompts, some longer than a chunk, is what each row comes to alone, token by token."""
    monkeypatch.setattr(solar.sampling, "PREFILL_CHUNK", 7)
    model, prompts = build(**changes), prompts_of(9, 1, 20, 14)
    batch = generate(model, prompts, 12)
    assert batch == [generate(model, [prompt], 12)[0] for prompt in prompts]
    for prompt, new in zip(prompts, batch, strict=True):
        assert len(new) == 12
        assert_greedy(model, prompt, new)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 20),
    chunk=st.integers(1, 18),
    new=st.integers(1, 8),
)
def test_any_batch_is_each_row_alone(lengths, window, chunk, new):
    model, prompts = build(torch.float64, sliding_window=window), prompts_of(*lengths, seed=sum(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solar.sampling, "PREFILL_CHUNK", chunk)
        batch = generate(model, prompts, new)
    for prompt, tokens in zip(prompts, batch, strict=True):
        assert len(tokens) == new
        assert_greedy(model, prompt, tokens, slack=1e-6)


def test_greedy_does_not_hear_of_the_filters():
    model, prompts = build(), prompts_of(3, 8)
    assert generate(model, prompts, 6) == generate(model, prompts, 6, top_k=1, top_p=0.1, min_p=0.9, seed=5)


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-40}], ids=str)
def test_the_narrowest_filters_are_greedy(setting):
    model, prompts = build(), prompts_of(3, 8)
    assert generate(model, prompts, 8, **({"temperature": 5.0} | setting)) == generate(model, prompts, 8)


def test_the_prompt_is_read_in_chunks_and_then_each_token_once(monkeypatch):
    monkeypatch.setattr(solar.sampling, "PREFILL_CHUNK", 7)
    model = build()
    shapes = count_passes(model)
    generate(model, prompts_of(16, 3), 4)
    # Seven tokens a pass, of both rows together; the last token is not fed back.
    assert shapes == [(2, 3)] * 5 + [(2, 1)] + [(2, 1)] * 3
    shapes.clear()
    assert [len(new) for new in generate(model, prompts_of(5), 1)] == [1]
    assert shapes == [(1, 5)]


def test_one_cache_of_the_right_size(monkeypatch):
    made = []

    class Recorded(KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            made.append((self, self.keys.data_ptr()))

    monkeypatch.setattr(solar.sampling, "KVCache", Recorded)
    for window, held in ((None, 26), (5, 5)):
        made.clear()
        generate(build(sliding_window=window), prompts_of(16, 3), 10)
        ((cache, place),) = made
        assert cache.keys.shape == (3, 2, 2, held, 8)
        assert cache.keys.data_ptr() == place


def test_one_layer_at_two_places():
    """A model that shares its layers generates what one with copies of them does."""
    model = build(torch.float64, num_hidden_layers=4, sliding_window=6)
    first, second = model.model.layers[:2]
    model.model.layers = nn.ModuleList([first, second, first, second])
    prompts = prompts_of(9, 4)
    for prompt, new in zip(prompts, generate(model, prompts, 8), strict=True):
        assert_greedy(model, prompt, new, slack=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, prompts = build(dtype, sliding_window=5), prompts_of(9, 1, 4)
    assert [len(new) for new in generate(model, prompts, 6)] == [6, 6, 6]
    sampled = generate(model, prompts, 6, 0.8, top_k=10, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=0)
    assert [len(new) for new in sampled] == [6, 6, 6]
    for prompt, new in zip(prompts, generate(model, prompts, 1), strict=True):
        assert_greedy(model, prompt, new, slack=0.1)


# ------------------------------------------------------------ where a row ends


def before(tokens: list[int], stops: set[int]) -> list[int]:
    return tokens[: next((at for at, token in enumerate(tokens) if token in stops), len(tokens))]


def test_a_row_ends_at_an_end_token_which_is_not_returned():
    model, prompts = build(), prompts_of(5, 9, 2)
    free = generate(model, prompts, 12)
    for row, at in ((0, 0), (1, 3), (2, 11)):
        stop = free[row][at]
        assert generate(model, prompts, 12, eos_id=stop) == [before(tokens, {stop}) for tokens in free]
    stops = {free[0][2], free[1][5]}
    for eos_id in (sorted(stops), tuple(stops)):
        assert generate(model, prompts, 12, eos_id=eos_id) == [before(tokens, stops) for tokens in free]
    assert generate(model, prompts, 12, eos_id=[]) == free
    unused = next(i for i in range(SMALL.vocab_size) if not any(i in tokens for tokens in free))
    assert generate(model, prompts, 12, eos_id=unused) == free


def test_when_all_rows_have_ended_no_pass_is_made():
    model, prompts = build(), prompts_of(5, 9)
    free = generate(model, prompts, 12)
    shapes = count_passes(model)
    assert generate(model, prompts, 12, eos_id=[free[0][0], free[1][0]]) == [[], []]
    assert len(shapes) == 1
    shapes.clear()
    generate(model, prompts, 12, on_token=lambda row, token: True)
    assert len(shapes) == 1


def test_on_token_hears_of_every_token_when_it_is_made():
    model, prompts = build(), prompts_of(5, 9, 2)
    heard = []
    shapes = count_passes(model)
    new = generate(model, prompts, 6, on_token=lambda row, token: heard.append((len(shapes), row, token)))
    assert heard == [(step + 1, row, new[row][step]) for step in range(6) for row in range(3)]
    heard.clear()
    stop = new[1][2]
    ended = generate(model, prompts, 6, eos_id=stop, on_token=lambda row, token: heard.append((row, token)))
    assert [[token for row, token in heard if row == wanted] for wanted in range(3)] == ended
    assert stop not in [token for _, token in heard]


def test_on_token_ends_a_row_and_no_other():
    model, prompts = build(), prompts_of(5, 9, 2)
    free, heard = generate(model, prompts, 8), []

    def on_token(row: int, token: int) -> bool:
        heard.append(row)
        return row == 1 and heard.count(1) == 3

    assert generate(model, prompts, 8, on_token=on_token) == [free[0], free[1][:3], free[2]]
    assert heard.count(1) == 3


@models
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_have_ended_leave_the_batch_and_the_others_do_not_notice(changes, temperature):
    model, prompts = build(**changes), prompts_of(5, 9, 2, 12, 7)
    settings = {"temperature": temperature, "seed": 3, "repetition_penalty": 1.2}
    free = generate(model, prompts, 14, **settings)
    lengths, heard = [3, 14, 2, 8, 3], [0] * 5

    def on_token(row: int, token: int) -> bool:
        heard[row] += 1
        return heard[row] == lengths[row]

    shapes = count_passes(model)
    ended = generate(model, prompts, 14, on_token=on_token, **settings)
    assert ended == [tokens[:length] for tokens, length in zip(free, lengths, strict=True)]
    assert [B for B, T in shapes if T == 1] == [5, 5] + [2] * 5 + [1] * 6


# ------------------------------------------------------------ from turn to turn


@pytest.mark.parametrize("window", [None, 1, 6, 20, 40], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_a_memory_each_turn_gets_the_tokens_that_it_gets_without(window, dtype):
    """Turns that go on, repeat, go back and change course, in fp64, which is not prepared, and in fp32, which is."""
    model, memory = build(dtype, sliding_window=window), Memory()
    (words,) = prompts_of(40)
    said = []
    for turn, count in (([5, 6], 3), ([7], 16), ([8, 9, 10], 2)):  # each prompt goes on behind the answer before
        said += turn
        (answer,) = generate(model, [said], count, memory=memory)
        assert [answer] == generate(model, [said], count)
        said += answer
    for prompt in (said, said, said[:9], said[:9] + words[:3], words[:20], words[:1], words):
        assert generate(model, [prompt], 4, memory=memory) == generate(model, [prompt], 4)


def test_with_a_memory_only_what_is_new_is_read():
    model, memory, (words,) = build(), Memory(), prompts_of(40)
    shapes = count_passes(model)
    (answer,) = generate(model, [words[:10]], 3, memory=memory)
    generate(model, [words[:10] + answer + words[10:14]], 3, memory=memory)
    generate(model, [words[:8]], 1, memory=memory)
    # The last token of an answer is not fed back, and the last of a prompt is always read: its logits are needed.
    assert shapes == [(1, 10), (1, 1), (1, 1), (1, 5), (1, 1), (1, 1), (1, 1)]


def test_a_memory_of_a_call_that_failed_is_empty():
    model, memory, (words,) = build(), Memory(), prompts_of(40)

    def fail(row: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [words], 5, on_token=fail, memory=memory)
    assert generate(model, [words[::-1]], 5, memory=memory) == generate(model, [words[::-1]], 5)
    assert generate(model, [words], 5, memory=memory) == generate(model, [words], 5)
    with pytest.raises(ValueError, match="one conversation; 2 prompts"):
        generate(model, [words, words], 5, memory=memory)


# ------------------------------------------------------------ drawing


def test_the_same_seed_draws_the_same():
    model, prompts = build(), prompts_of(5, 9, 2)
    draw = lambda seed, rows=prompts: generate(model, rows, 10, temperature=1.0, seed=seed)
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)
    assert draw(-1) == draw(-1)
    assert len(draw(2**63 - 1)) == 3


def test_what_a_row_draws_does_not_depend_on_its_neighbours():
    model, prompts = build(torch.float64, sliding_window=6), prompts_of(5, 9, 2)
    settings = {"temperature": 0.9, "top_k": 30, "repetition_penalty": 1.1}
    batch = generate(model, prompts, 10, seed=7, **settings)
    assert batch == [generate(model, [prompt], 10, seed=7 + row, **settings)[0] for row, prompt in enumerate(prompts)]
    same = generate(model, [prompts[0]] * 3, 10, seed=7, **settings)
    assert same[0] == batch[0]
    assert len({tuple(row) for row in same}) == 3  # each row has a generator of its own
    stop = batch[0][2]  # a neighbour that ends does not matter either
    assert generate(model, prompts, 10, seed=7, eos_id=stop, **settings) == [before(row, {stop}) for row in batch]


@pytest.mark.parametrize(
    "setting", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 2.0}], ids=str
)
def test_tokens_are_drawn_as_often_as_they_should_be(setting):
    """Chi-square of 4,000 rows, each with the next seed, against the probabilities of a full pass."""
    model, (prompt,) = build(), prompts_of(3)
    N = 4000
    drawn = torch.tensor(generate(model, [prompt] * N, 1, seed=0, **setting))[:, 0]
    probabilities = choose_probabilities(full_pass(model, prompt, [0]), **setting)[0].double()
    counts = drawn.bincount(minlength=SMALL.vocab_size)
    assert (counts[probabilities == 0] == 0).all()
    common = probabilities * N > 5
    observed = torch.cat((counts[common], counts[~common].sum()[None])).double()
    expected = torch.cat((probabilities[common], probabilities[~common].sum()[None])) * N
    kept = expected > 0
    statistic = float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert freedom >= 3
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5


# ------------------------------------------------------------ the filters

GOLDEN = Path(__file__).parent / "golden"
WARPED = np.load(GOLDEN / "warpers.npz")
WARPERS = json.loads((GOLDEN / "warpers.json").read_text())


@pytest.mark.parametrize("index", range(len(WARPERS)), ids=[json.dumps(w["settings"])[1:-1] for w in WARPERS])
def test_probabilities_are_those_of_transformers(index):
    setting = dict(WARPERS[index]["settings"])
    expected = torch.from_numpy(WARPED["probabilities"][index])
    logits, context = torch.from_numpy(WARPED["logits"]), torch.from_numpy(WARPED["context"])
    if (penalty := setting.pop("repetition_penalty", None)) is not None:
        seen = torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, context, True)
        logits = penalise_repetition(logits, seen, penalty)
    got = choose_probabilities(logits, **setting)
    assert torch.equal(got > 0, expected > 0)  # the same tokens are kept
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_the_filters_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    close = lambda expected, **setting: torch.testing.assert_close(
        choose_probabilities(logits, **setting), torch.tensor([expected])
    )
    close([0.5, 0.25, 0.125, 0.125])
    close([0.5, 0.25, 0.125, 0.125], top_k=4, top_p=1.0, min_p=0.0)
    close([0.5, 0.25, 0.125, 0.125], top_k=100)  # more than there are
    close([2 / 3, 1 / 3, 0, 0], top_k=2)
    close([2 / 3, 1 / 3, 0, 0], top_p=0.6)
    close([2 / 3, 1 / 3, 0, 0], min_p=0.4)
    close([1.0, 0, 0, 0], top_p=0.4)  # always one
    close([1.0, 0, 0, 0], min_p=1.0)
    close([16 / 22, 4 / 22, 1 / 22, 1 / 22], temperature=0.5)
    close([16 / 20, 4 / 20, 0, 0], temperature=0.5, top_k=2)
    close([1.0, 0, 0, 0], temperature=0.5, top_p=0.7)  # the temperature comes first: 16/22 is above 0.7
    close([1.0, 0, 0, 0], temperature=1e-40)
    close([0.25] * 4, temperature=1e30)


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20),
    temperature=st.floats(1e-3, 1e3),
    top_k=st.none() | st.integers(1, 25),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    min_p=st.none() | st.floats(0, 1),
)
def test_any_filters_leave_probabilities(logits, temperature, top_k, top_p, min_p):
    got = choose_probabilities(torch.tensor([logits]), temperature, top_k, top_p, min_p)[0]
    assert got.isfinite().all()
    assert float(got.sum()) == pytest.approx(1, abs=1e-5)
    plain = choose_probabilities(torch.tensor([logits]), temperature)[0]
    assert plain[got.argmax()] == plain.max()
    kept = got > 0
    if kept.any() and not kept.all():
        assert plain[kept].min() >= plain[~kept].max()  # what is dropped is never likelier than what is kept


@pytest.mark.parametrize("penalty", [0.5, 3.0])
def test_repetition_penalty_in_a_generation(penalty):
    """The prompt counts, and so does each new token from then on."""
    model, prompts = build(), prompts_of(17, 3)
    batch = generate(model, prompts, 12, repetition_penalty=penalty)
    assert batch != generate(model, prompts, 12)
    for prompt, new in zip(prompts, batch, strict=True):
        logits = full_pass(model, prompt, new)
        for at, token in enumerate(new):
            for used in set(prompt + new[:at]):
                logits[at, used] *= 1 / penalty if logits[at, used] > 0 else penalty
            assert logits[at, token] > logits[at].max() - 1e-4


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompts": []}, "at least one token"),
        ({"prompts": [[1], []]}, "at least one token"),
        ({"prompts": [[1], [2, 61]]}, "prompt 1 holds the id 61; .* 0 to 60"),
        ({"prompts": [[-1]]}, "prompt 0 holds the id -1"),
        ({"prompts": [[1], [1] * 60], "max_new_tokens": 5}, "prompt 1 has 60 tokens; with 5 new .* 64 .* shorten it"),
        ({"prompts": [[1] * 70], "max_new_tokens": 5}, "prompt 0 has 70 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
        ({"max_new_tokens": -3}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
    ],
)
def test_what_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        generate(build(), **({"prompts": [[1, 2]], "max_new_tokens": 3} | arguments))


def test_the_whole_context_can_be_filled():
    for window in (None, 8):
        (new,) = generate(build(sliding_window=window), prompts_of(60), 4)
        assert len(new) == 4


def overflowing() -> Transformer:
    """An fp16 model that counts upwards, and whose logits behind token 10 are no longer finite."""
    model = build()
    for parameter in model.parameters():
        parameter.data.zero_()
    model.model.norm.weight.data.fill_(1)
    model.model.embed_tokens.weight.data[:31] = torch.eye(32)[:31]
    model.lm_head.weight.data[1:32] = torch.eye(32)[:31]
    model.lm_head.weight.data[11] *= 60_000
    return model.half()


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 0, "top_k": 1}])
@pytest.mark.parametrize("new", [8, 24])  # without and with what is prepared
def test_logits_that_overflow_on_the_way_are_an_error(settings, new, monkeypatch):
    monkeypatch.setattr(solar.sampling, "prepare", lambda *_: None) if new == 8 else None
    made = []
    with pytest.raises(ValueError, match=r"not finite in torch\.float16: try bfloat16"):
        generate(overflowing(), [[7]], new, on_token=lambda _, token: made.append(token), **settings)
    assert made == [8, 9, 10]


def test_a_temperature_that_is_zero_in_fp32_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 2.9]])
    for temperature in (1e-30, 1e-45, 1e-50, 5e-324):
        assert choose_probabilities(logits, temperature).tolist() == [[0, 1, 0]]
