"""Reading, rendering and marking of the six benchmarks, against what lm-evaluation-harness made of the same files."""

import hashlib
import json
import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar import standin, tasks
from solar.tasks import TASKS, Question, Score, load

HERE = Path(__file__).parent / "golden"
GOLDEN = json.loads((HERE / "harness.json").read_text(encoding="utf-8"))
PROMPTS = (HERE / "prompts.txt").read_text(encoding="utf-8")
all_tasks = pytest.mark.parametrize("name", TASKS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmarks") / "standin"
    standin.write(standin.Options(out=str(out)))
    return out


@pytest.fixture
def spoilt(data, tmp_path):
    """spoilt(path, change) -> the directory, with one file's text changed."""

    def spoil(path, change):
        for name, text in standin.files():
            target = tmp_path / "data" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(change(text) if name == path else text, encoding="utf-8", newline="")
        return tmp_path / "data"

    return spoil


# ------------------------------------------------------------------------------------------------ rendering


def test_the_golden_numbers_are_of_these_files():
    digest = hashlib.sha256()
    for name, text in standin.files():
        digest.update(f"{name}\n{text}".encode())
    assert digest.hexdigest() == GOLDEN["data"], "solar/standin.py has changed: make the golden numbers again"


@all_tasks
def test_prompts_are_the_harness_s_to_the_letter(name, data):
    """prompts.txt, by lm_eval: the first question of each benchmark, of MMLU that of one subject."""
    groups, _ = load(name, data)
    group = next(group for group in groups if group.subject in ("", "made_up_sums"))
    question, written = group.questions[0], ""
    for number, (context, continuation) in enumerate(zip(question.contexts, question.continuations, strict=True)):
        if not number or context != question.contexts[0]:
            written += f"======== {name}: prompt\n{group.before[0]}{context}\n"
        shown = repr(continuation) if name != "gsm8k" else "(generated)"
        written += f"======== {name}: continuation\n{shown}\n"
    theirs = "".join(re.findall(rf"^======== {name}: .*\n(?:(?!========).*\n)*", PROMPTS, re.MULTILINE))
    assert written == theirs


@all_tasks
def test_every_question_stands_behind_its_shots(name, data):
    groups, _ = load(name, data)
    for group in groups:
        assert len(group.before) == len(group.questions)
        assert group.before[0].count("\n\n") >= TASKS[name].shots
        assert len(set(group.before)) == 1
    assert len(groups) == (len(standin.SUBJECTS) if name == "mmlu" else 1)
    assert sum(len(group.questions) for group in groups) == 48


def test_limit_counts_by_subject(data):
    assert [len(group.questions) for group in load("mmlu", data, limit=3)[0]] == [3, 3, 3]
    assert len(load("gsm8k", data, limit=1000)[0][0].questions) == 48


def test_cleaning_keeps_what_one_pass_leaves():
    row = {"activity_label": "Roof", "ctx_a": "[header] How to [title] climb [substeps] it.", "ctx_b": "he IS Up",
           "endings": ["  [step]  a  b ", "c", "d [title] e", ""], "label": "1"}  # fmt: skip
    question = tasks.hellaswag(row)
    assert question.contexts[0] == "Roof: How to. climb it. He is up"
    assert question.continuations == ("  a b", " c", " d. e", " ")
    assert question.gold == 1


def test_arc_takes_the_release_s_nesting():
    flat = {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    listed = [{"text": text, "label": label} for text, label in zip("abc", "123", strict=True)]
    nested = {"question": {"stem": "Why?", "choices": listed}, "answerKey": "3"}
    assert tasks.arc(flat) == tasks.arc(nested)
    assert tasks.arc(flat).solved() == "Question: Why?\nAnswer: c"


def test_the_leaderboard_s_shots_are_those_of_its_harness(data):
    """Its loop, written out: one generator of seed 42 shuffles the questions, and then serves one after the other."""
    pool = [json.loads(line)["question"] for line in (data / "arc_challenge/train.jsonl").read_text().splitlines()]
    asked = [json.loads(line)["question"] for line in (data / "arc_challenge/test.jsonl").read_text().splitlines()]
    rnd = random.Random()
    rnd.seed(42)
    docs = list(range(len(asked)))
    rnd.shuffle(docs)
    group = load("arc_challenge", data, limit=7, draw=True)[0][0]
    for doc in docs:
        shots = rnd.sample(pool, 25)
        if doc < 7:
            assert re.findall(r"Question: (.*)\n", group.before[doc]) == shots
    assert len(set(group.before)) == 7
    assert load("mmlu", data, draw=True) == load("mmlu", data)  # in order, there too


# ------------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        ("arc_challenge/test.jsonl", lambda text: text[:-30], r"test\.jsonl, line 48: no JSON \(cut short"),
        ("arc_challenge/train.jsonl", lambda text: "\n".join(text.split("\n")[:24]), "24 rows, and ARC-Challenge sho"),
        ("arc_challenge/test.jsonl", lambda text: "", "no rows in it"),
        ("arc_challenge/test.jsonl", lambda text: text.replace('"answerKey": "D"', '"answerKey": "X"', 1),
         r"line 1: no question of ARC-Challenge: the answer is 'X', which is none of A, B, C, D"),
        ("hellaswag/hellaswag_val.jsonl", lambda text: text.replace('"endings"', '"ends"', 1), "no field 'endings'"),
        ("hellaswag/hellaswag_val.jsonl", lambda text: re.sub('"label": .', '"label": 9', text, count=1), "choice 9"),
        ("hellaswag/hellaswag_val.jsonl", lambda text: re.sub('"label": .', '"label": ""', text, count=1), "line 1"),
        ("winogrande/dev.jsonl", lambda text: text.replace("_ now", "He now", 1), 'no "_" in the "sentence"'),
        ("winogrande/dev.jsonl", lambda text: text.replace('"2"}', '""}', 1), "the answer is ''"),
        ("gsm8k/train.jsonl", lambda text: text.replace("#### ", "", 1), 'line 1: .* no "#### "'),
        ("gsm8k/test.jsonl", lambda text: "[1]\n", "line 1: no question of GSM8K"),
        ("truthfulqa/mc_task.json", lambda text: text[: len(text) // 2], "no JSON"),
        ("truthfulqa/mc_task.json", lambda text: text.replace(": 1", ": 0"), '"mc2_targets" must hold answers marked'),
        ("mmlu/test/made_up_stories_test.csv", lambda text: text[:-2], "line 16: .* the answer is ''"),
        ("mmlu/test/made_up_stories_test.csv", lambda text: text[:-9], "line 16: .* fields; wanted are 6"),
        ("mmlu/dev/made_up_sums_dev.csv", lambda text: text[: len(text) // 2], "fields; wanted are 6"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_in_one_line(spoilt, path, change, said):
    directory = spoilt(path, change)
    with pytest.raises(ValueError, match=said) as caught:
        load(path.partition("/")[0], directory)
    assert "\n" not in str(caught.value)
    assert Path(path).name in str(caught.value)


def test_missing_files_are_named_with_who_publishes_them(data, tmp_path, spoilt):
    with pytest.raises(FileNotFoundError, match=r"no test\.jsonl or ARC-.*; ARC-Challenge is published at allenai"):
        load("arc_challenge", tmp_path)
    directory = spoilt("", str)
    (directory / "mmlu/dev/made_up_sums_dev.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"dev/made_up_sums_dev\.csv: no such file"):
        load("mmlu", directory)
    directory = spoilt("", str)
    (directory / "mmlu/test/made_up_sums_test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"test/made_up_sums_test\.csv: no such file, but there are shots"):
        load("mmlu", directory)


def test_tasks_by_name():
    assert tasks.parse_tasks("all") == list(TASKS)
    assert tasks.parse_tasks("gsm8k,arc_challenge") == ["arc_challenge", "gsm8k"]
    with pytest.raises(ValueError, match="--tasks arc: 'arc' is none of arc_challenge, hellaswag"):
        tasks.parse_tasks("arc")
    assert all(f"DATA/{name}/" in tasks.sources() for name in TASKS)


# ------------------------------------------------------------------------------------------------ marks


@pytest.mark.parametrize("entry", GOLDEN["hard"], ids=lambda entry: repr(entry["text"]))
def test_extractors_find_what_the_harness_s_find(entry):
    question = Question(("Question: ?\nAnswer:",), (" 600 + 634 = 1,234\n#### 1,234",), 0)
    assert tasks.mark_answer(question, entry["text"]) == {
        "score": entry["strict"], "flexible": entry["flexible"],
        "strict_answer": entry["strict_answer"], "flexible_answer": entry["flexible_answer"],
    }  # fmt: skip


def test_an_answer_ends_at_the_first_stop():
    assert tasks.cut("a</s>b Question: c") == "a"
    assert tasks.cut("a b") == "a b"
    assert tasks.cut("so: #### 1", (tasks.LEADERBOARD_STOP,)) == "so"


def test_the_first_of_equals_wins_and_characters_count_without_the_space():
    question = Question(("q",) * 3, (" ab", " abcd", " a"), 1)
    assert tasks.mark("acc", question, [-2.0, -1.0, -1.0]) == {"choice": 1, "score": 1.0}
    assert tasks.mark("acc_norm", question, [-1.0, -2.0, -3.0]) == {"choice": 0, "score": 0.0, "acc": 0.0}
    assert tasks.mark("acc_norm", question, [-1.0, -1.9, -0.9]) == {"choice": 1, "score": 1.0, "acc": 0.0}


@given(st.lists(st.tuples(st.floats(-900, 0), st.booleans()), min_size=2, max_size=8))
def test_mc2_is_the_share_of_the_true_ones_however_unlikely_all_are(answers):
    logps, gold = zip(*answers, strict=True)
    score = tasks.mark("mc2", Question(("q",) * len(gold), (" a",) * len(gold), gold), list(logps))["score"]
    share = sum(math.exp(logp - max(logps)) for logp, true in answers if true)
    assert score == pytest.approx(share / sum(math.exp(logp - max(logps)) for logp in logps))
    assert 0 <= score <= 1


def test_standard_errors():
    assert tasks.average([1.0, 0.0, 0.0, 0.0]) == Score(0.25, pytest.approx(math.sqrt(0.1875 / 3)), 4)
    assert math.isnan(tasks.average([1.0]).stderr)
    both = tasks.mean_of_means([Score(0.2, 0.03, 10), Score(0.4, 0.04, 1000)])
    assert both == Score(pytest.approx(0.3), pytest.approx(0.025), 1010)
