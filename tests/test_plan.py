"""Plans against the papers' own tables, and the grammar against everything that is not in it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar.plan import Source, expand, from_json, interlock, layer_table, new_layers, parse_plan, seams, to_json

layers = lambda plan: [source.layer for source in plan]


def test_dus_is_solar():
    """arXiv:2312.15166, section 2: n = 32, m = 8, s = 48."""
    plan = parse_plan("dus:8", 32)
    assert layers(plan) == [*range(24), *range(8, 32)]
    assert parse_plan("dus", 32) == plan  # m = n // 4
    assert seams(plan) == [(24, -16)]
    assert new_layers(plan) == list(range(24, 40))  # 8..23 stand for the second time; 24..31 for the first


@pytest.mark.parametrize(("group", "first"), [(1, [0, 8, 1, 9, 2, 10]), (8, [*range(8), *range(8, 16), 8])])
def test_idus_is_the_published_interlocking(group, first):
    plan = parse_plan(f"idus:8:{group}", 32)
    assert len(plan) == 48
    assert layers(plan)[: len(first)] == first
    assert sorted(layers(plan)) == sorted(layers(parse_plan("dus:8", 32)))


def test_idus_short_last_group():
    assert layers(parse_plan("idus:1:2", 6)) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]


@given(n=st.integers(1, 40), data=st.data())
def test_interlock_identities(n, data):
    m = data.draw(st.integers(0, n - 1))
    group = data.draw(st.integers(1, n))
    plan = interlock(n, m, group)
    assert len(plan) == 2 * (n - m)
    assert sorted(layers(plan)) == sorted([*range(n - m), *range(m, n)])
    assert interlock(n, m, n - m) == parse_plan(f"dus:{m}", n)
    assert interlock(n, 0, n) == parse_plan("stack", n)
    assert from_json(json.loads(json.dumps(to_json(plan))), n) == plan


def test_expand_is_llama_pro():
    """arXiv:2401.02415: 32 -> 40, an identity copy of the last layer after every group of four."""
    plan = parse_plan("expand", 32)
    assert len(plan) == 40
    assert [p for p, source in enumerate(plan) if source.init == "identity"] == list(range(4, 40, 5))
    assert all(plan[p].layer == plan[p - 1].layer for p in range(4, 40, 5))
    assert new_layers(plan) == list(range(4, 40, 5))
    assert seams(plan) == []
    assert expand(6, 2, 2) == [Source(i, k) for i, k in [(0, "copy"), (1, "copy"), (2, "copy"), (1, "identity")]] + [
        Source(i, k)
        for i, k in [(2, "identity"), (3, "copy"), (4, "copy"), (5, "copy"), (4, "identity"), (5, "identity")]
    ]


@pytest.mark.parametrize(("n", "depth"), [(1, 2), (2, 3), (3, 4), (7, 8), (12, 15), (30, 36), (80, 100)])
def test_expand_default_takes_the_largest_divisor_of_a_quarter(n, depth):
    assert len(parse_plan("expand", n)) == depth


def test_slices_and_copy():
    assert layers(parse_plan("slices:0-24,8-32", 32)) == layers(parse_plan("dus:8", 32))
    assert layers(parse_plan("slices:3-5,0-1", 6)) == [3, 4, 0]
    assert layers(parse_plan("copy", 5)) == [0, 1, 2, 3, 4]


WRONG = ["", "dus:", "dus:x", "dus:1:2", "idus:8", "idus", "idus:1:2:3", "stack:1", "expand:1:1:1", "slices", "slices:"]
WRONG += ["slices:1", "slices:a-b", "slices:0-2,", "slices:-1-2", "copy:1", "DUS:8", "mergekit", "dus:8 ", "dus:1.5"]
WRONG += [
    "dus: 8",
    "dus:８",
    "dus:8:",
    "dus::8",
    "stack:",
    "copy:",
    "expand:8:",
    "idus::",
    "dus:+8",
    "dus:8_0",
    ":",
    "dus:" + "1" * 10,
]


@pytest.mark.parametrize("text", WRONG)
def test_what_the_grammar_does_not_have(text):
    with pytest.raises(ValueError, match="plan"):
        parse_plan(text, 32)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dus:32", "M = 32 does not fit a model of 32 layers"),
        ("dus:-1", "M = -1"),
        ("idus:8:0", "G = 0"),
        ("expand:5", "GROUPS = 5 does not divide 32"),
        ("expand:0", "GROUPS = 0"),
        ("expand:8:5", "TOP = 5 must be between 1 and the 4 layers"),
        ("expand:8:0", "TOP = 0"),
        ("slices:0-33", "0-33 does not fit"),
        ("slices:5-5", "5-5"),
        ("slices:9-3", "9-3"),
    ],
)
def test_a_plan_that_does_not_fit_says_why(text, says):
    with pytest.raises(ValueError, match=says):
        parse_plan(text, 32)


def test_json_plans(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('[{"layer": 0}, {"layer": 2, "init": "identity"}]')
    assert parse_plan(str(path), 3) == [Source(0), Source(2, "identity")]
    path.write_text('{"plan": [{"layer": 1}], "new_layers": []}')  # a whole upscale.json
    assert parse_plan(str(path), 3) == [Source(1)]
    with pytest.raises(FileNotFoundError):
        parse_plan(str(tmp_path / "absent.json"), 3)


BAD_JSON = ["", "{", "[]", "{}", "3", '[{"layer": 3}]', '[{"layer": -1}]', '[{"layer": true}]', '[{"layer": "0"}]']
BAD_JSON += ['[{"layer": 0, "init": "zero"}]', '[{"layer": 0, "scale": 2}]', "[0]", "[" * 100_000, '[{"init": "copy"}]']


@pytest.mark.parametrize("content", BAD_JSON)
def test_json_that_is_no_plan(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"plan\.json"):
        parse_plan(str(path), 3)


def test_layer_table_shows_runs_seams_and_what_is_new():
    table = layer_table(parse_plan("dus:8", 32)).splitlines()
    assert [line.split() for line in table[1:]] == [
        ["0-23", "<-", "0-23", "copy"],
        ["24-39", "<-", "8-23", "copy", "new;", "seam", "23", "->", "8,", "jump", "-16"],
        ["40-47", "<-", "24-31", "copy"],
    ]
    assert layer_table(parse_plan("expand:1", 4)).splitlines()[-1].split() == ["4", "<-", "3", "identity", "new"]


@given(n=st.integers(1, 20), data=st.data())
def test_layer_table_covers_every_layer_once(n, data):
    plan = [
        Source(data.draw(st.integers(0, n - 1)), data.draw(st.sampled_from(["copy", "identity"])))
        for _ in range(data.draw(st.integers(1, 12)))
    ]
    told = []
    for line in layer_table(plan).splitlines()[1:]:
        target, _, source, init, *_ = line.split()
        spans = [[int(x) for x in (text.split("-") * 2)[:2]] for text in (target, source)]
        (first, last), (base, top) = spans
        assert last - first == top - base
        told += [(first + k, Source(base + k, init)) for k in range(last - first + 1)]
    assert told == list(enumerate(plan))
