"""The commands that make mathematics data: rows, counts, what is refused, and a run by a model that is cut off."""

import json
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch

from solar import base, mathdata, problems
from solar.chats import parse_chat, parse_pair
from solar.seeds import extract_answer, same_answer

GSM8K = {
    "question": "Natalia sold 48 clips, and then half as many. How many did she sell altogether?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips.\nThat is 48+24 = <<48+24=72>>72.\n#### 72",
}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(command, *argv):
    """The command as it is typed, with lists as several words."""
    options, do = mathdata.COMMANDS[command]
    words = [str(word) for item in argv for word in (item if isinstance(item, list) else [item])]
    do(mathdata.cli.parse(options, words, prog="x", description="x"))


@pytest.fixture
def seeds(tmp_path):
    """20 generated problems, one of GSM8K, and one that is held out."""
    path = tmp_path / "seeds.jsonl"
    run("problems", "--out", path, "--count", 20)
    held_out = next(problems.generate(0, "heldout"))
    rows = [GSM8K, {"question": held_out.question, "answer": f"{held_out.solution} Answer: {held_out.answer}"}]
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


# ------------------------------------------------------------------------------------------------ problems


def test_seed_problems_are_the_generated_ones(tmp_path, capsys):
    out = tmp_path / "new" / "seeds.jsonl"
    run("problems", "--out", out, "--count", 50, "--seed", 3)
    assert capsys.readouterr().out == f"50 problems\n{out}\n"
    expected = [*islice(problems.generate(3, "train"), 50)]
    for row, problem in zip(lines(out), expected, strict=True):
        assert row["question"] == problem.question
        assert row["answer"] == f"{problem.solution} Answer: {problem.answer}"
        assert problems.is_held_out(row["family"], tuple(row["operands"])) is False
    assert [path.name for path in out.parent.iterdir()] == ["seeds.jsonl"]


def test_seed_problems_of_some_families_are_all_different(tmp_path):
    out = tmp_path / "seeds.jsonl"
    run("problems", "--out", out, "--count", 3_000, "--families", "comparison", "two items")
    rows = lines(out)
    assert {row["family"] for row in rows} == {"comparison", "two items"}
    assert len({row["question"] for row in rows}) == 3_000


def test_more_problems_than_there_are_end_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(mathdata, "DRAWS", 20)
    with pytest.raises(ValueError, match="--count 100000: there are few more than"):
        run("problems", "--out", tmp_path / "a.jsonl", "--count", 100_000, "--families", "comparison")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("flags", "says"), [(["--families", "gain"], "'gain' is not one of gains"), (["--count", 0], "at least 1 problem")]
)
def test_wrong_flags_of_problems(tmp_path, flags, says):
    with pytest.raises(ValueError, match=says):
        run("problems", "--out", tmp_path / "a.jsonl", *flags)


# ------------------------------------------------------------------------------------------------ rephrase, by rules


def test_rules_rephrase_everything_but_what_is_held_out(seeds, tmp_path, capsys):
    out = tmp_path / "instruct.jsonl"
    run("rephrase", "--seeds", seeds, "--out", out, "--per-seed", 3)
    assert "1 held-out problems left out\nkept 63 of 63 rephrasings\n" in capsys.readouterr().out
    rows = lines(out)
    originals = {row["question"]: row["answer"] for row in lines(seeds)[:20]}
    for row in rows:
        assert [*row] == ["instruction", "output", "original_question", "original_answer", "answer"]
        assert same_answer(extract_answer(row["output"]), row["answer"])
        assert row["instruction"] != row["original_question"]
        if row["original_question"] in originals:
            assert row["original_answer"] == originals[row["original_question"]]
        else:
            assert row["original_answer"] == re.sub("<<.*?>>", "", GSM8K["answer"])
    assert len({row["instruction"] for row in rows}) == 63
    before = out.read_bytes()
    run("rephrase", "--seeds", seeds, "--out", out, "--per-seed", 3, "--force")
    assert out.read_bytes() == before
    run("rephrase", "--seeds", seeds, "--out", out, "--per-seed", 3, "--seed", 1, "--force")
    assert out.read_bytes() != before


def test_a_count_takes_one_rephrasing_of_each_first(seeds, tmp_path):
    out = tmp_path / "instruct.jsonl"
    run("rephrase", "--seeds", seeds, "--out", out, "--per-seed", 3, "--count", 25)
    rows = lines(out)
    assert len(rows) == 25
    assert len({row["original_question"] for row in rows[:21]}) == 21


def test_a_wrong_seed_answer_is_dropped_and_nothing_left_is_an_error(tmp_path):
    problem = next(problems.generate(0, "train"))
    path, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"question": problem.question, "answer": "Answer: 1000000"}))
    with pytest.raises(ValueError, match="nothing could be kept: kept 0 of 1 rephrasings; another final answer: 1"):
        run("rephrase", "--seeds", path, "--out", out)
    held_out = next(problems.generate(0, "heldout"))
    path.write_text(json.dumps({"question": held_out.question, "answer": f"Answer: {held_out.answer}"}))
    with pytest.raises(ValueError, match="all problems are held out"):
        run("rephrase", "--seeds", path, "--out", out)
    assert not out.exists()


def test_bad_rows_stop_or_are_named_and_counted(seeds, tmp_path, capsys):
    with open(seeds, "a", encoding="utf-8") as file:
        file.write('{"question": "q"}\n{\n')
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=r"seeds\.jsonl, line 23: fields \['question'\]; wanted"):
        run("rephrase", "--seeds", seeds, "--out", out)
    run("rephrase", "--seeds", seeds, "--out", out, "--skip-bad-lines")
    captured = capsys.readouterr()
    assert "2 bad lines left out\n" in captured.out
    assert f"note: {seeds}, line 24: no JSON\n" in captured.err


def test_what_exists_is_not_replaced(seeds, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        run("problems", "--out", seeds)
    with pytest.raises(ValueError, match="is read and cannot be written too"):
        run("rephrase", "--seeds", seeds, "--out", seeds, "--force")
    with pytest.raises(FileExistsError):
        run("problems", "--out", tmp_path, "--force")


# ------------------------------------------------------------------------------------------------ rephrase, by a model


@pytest.fixture
def speak(monkeypatch):
    """speak(stop_at) puts a speaker in the model's place: right about two problems of three; interrupted at a call."""
    calls = []

    def speak(stop_at=None):
        calls.clear()
        tokenizer = mathdata.Tokenizer(base.ASSETS)

        def generate(model, prompts, max_new_tokens, *, on_token, seed, **settings):
            assert isinstance(model, torch.nn.Module)
            assert len(prompts) <= 4
            calls.append(seed)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return [one(row, prompt, on_token) for row, prompt in enumerate(prompts)]

        def one(row, prompt, on_token):
            text = tokenizer.decode(prompt)
            question = re.search(r".*\nQuestion: (.*?)\n", text, flags=re.DOTALL).group(1)
            written = f"Here it is:\nWell, {question}\n and more"
            if text.endswith("Answer:"):
                problem = problems.recognise(question)
                right = problem is not None and problem.operands[0] % 3
                written = f" So.\nThe answer is: {problem.answer if right else 7}\n and more"
            ids = []
            for token in tokenizer.encode(written, bos=False):
                ids.append(token)
                if on_token(row, token):
                    break
            return ids

        monkeypatch.setattr(mathdata, "generate", generate)
        return calls

    return speak


def by_model(seeds, out, *more):
    argv = ["--seeds", seeds, "--out", out, "--model", base.ASSETS, "--template", "plain", "--batch-size", 4]
    run("rephrase", *argv, "--max-new-tokens", 100, *more)


def test_a_model_rephrases_then_answers_what_it_wrote(seeds, tmp_path, speak, capsys):
    calls, out = speak(), tmp_path / "instruct.jsonl"
    by_model(seeds, out)
    rows = lines(out)
    right = [row for row in lines(seeds)[:20] if row["operands"][0] % 3]
    assert {row["original_question"] for row in rows} == {row["question"] for row in right}
    for row in rows:
        assert row["instruction"] == f"Well, {row['original_question']}"
        assert row["output"] == f"So.\nThe answer is: {row['answer']}\nAnswer: {row['answer']}"
    dropped = 21 - len(rows)
    assert f"kept {len(rows)} of 21 rephrasings; another final answer: {dropped}\n" in capsys.readouterr().out
    assert len(set(calls)) == len(calls) == 12
    by_model(seeds, out, "--count", 6, "--force")
    assert lines(out) == rows[:6]
    assert not out.with_name(out.name + ".partial").exists()


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_a_run_by_a_model_goes_on_where_it_was_cut_off(seeds, tmp_path, speak, stop_at):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    partial = out.with_name(out.name + ".partial")
    speak()
    by_model(seeds, whole)
    speak(stop_at)
    with pytest.raises(KeyboardInterrupt):
        by_model(seeds, out)
    assert not out.exists()
    with open(partial, "ab") as file:
        file.write(b'{"done": 20, "ro')  # as a killed process may leave it
    calls = speak()
    by_model(seeds, out)
    assert len(calls) == 12 - (stop_at - 1) // 2 * 2
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_what_another_run_has_begun_is_not_continued(seeds, tmp_path, speak):
    out = tmp_path / "out.jsonl"
    partial = out.with_name(out.name + ".partial")
    speak(5)
    with pytest.raises(KeyboardInterrupt):
        by_model(seeds, out)
    speak()
    with pytest.raises(ValueError, match="was begun with another model, other seeds or options"):
        by_model(seeds, out, "--temperature", 0.5)
    partial.write_text("[]\n")
    with pytest.raises(ValueError, match=r"partial, line 1: not what this command writes"):
        by_model(seeds, out)


def test_a_run_that_did_not_get_to_work_is_in_nobodys_way(seeds, tmp_path, speak):
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="temperature must be 0"):
        by_model(seeds, out, "--temperature", -1)
    speak()
    by_model(seeds, out)
    assert len(lines(out)) > 5
    with pytest.raises(FileNotFoundError):
        run("rephrase", "--seeds", seeds, "--out", tmp_path / "other.jsonl", "--model", tmp_path / "nowhere")
    assert {path.name for path in tmp_path.iterdir()} == {"seeds.jsonl", "out.jsonl"}


def test_nothing_kept_by_a_model_is_an_error_and_leaves_nothing(seeds, tmp_path):
    """The base as it is: what it writes in ten tokens is no question."""
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="nothing could be kept: kept 0 of 21 rephrasings; n"):
        by_model(seeds, out, "--max-new-tokens", 10, "--batch-size", 21)
    assert {path.name for path in tmp_path.iterdir()} == {"seeds.jsonl"}


def test_prompts_longer_than_the_context_are_counted(seeds, tmp_path, speak, capsys):
    rows = lines(seeds)
    long = {"question": "Why? " + "word " * 3_000, "answer": "Answer: 3"}
    seeds.write_text("".join(json.dumps(row) + "\n" for row in [*rows, long]))
    speak()
    by_model(seeds, tmp_path / "out.jsonl")
    assert "too long for the model: 1" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ pairs


def test_pairs_of_rephrased_and_original_answers(seeds, tmp_path, capsys):
    instruct, out = tmp_path / "instruct.jsonl", tmp_path / "pairs.jsonl"
    run("rephrase", "--seeds", seeds, "--out", instruct)
    rows = lines(instruct)
    same = {"instruction": "q", "output": "Answer: 3", "original_answer": "Answer: 3 "}
    held_out = next(problems.generate(0, "heldout")).question
    never = {"instruction": held_out, "output": "Answer: 3", "original_answer": "x Answer: 3"}
    instruct.write_text("".join(json.dumps(row) + "\n" for row in [*rows, same, never]))
    run("pairs", "--instruct", instruct, "--out", out)
    expected = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": row["original_answer"]}
        | {"original_question": row["original_question"]}
        for row in rows
    ]
    assert {*map(_split_key, lines(out))} == {*map(_split_key, rows)} == {row["original_question"] for row in rows}
    assert lines(out) == expected
    assert capsys.readouterr().out.endswith(f"21 pairs; chosen equals rejected: 1; a held-out problem: 1\n{out}\n")


def _split_key(row):
    return (parse_pair(row) if "chosen" in row else parse_chat(row)).opening()


def test_pairs_of_rows_that_name_no_original_question(tmp_path):
    instruct, out = tmp_path / "instruct.jsonl", tmp_path / "pairs.jsonl"
    row = {"instruction": "q", "output": "a", "original_answer": "b"}
    instruct.write_text(json.dumps(row) + "\n")
    run("pairs", "--instruct", instruct, "--out", out)
    assert lines(out) == [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    instruct.write_text(json.dumps(row | {"original_question": 3}) + "\n")
    with pytest.raises(ValueError, match='line 1: no string "original_question"'):
        run("pairs", "--instruct", instruct, "--out", out, "--force")


def test_rows_that_make_no_pair(tmp_path):
    instruct, out = tmp_path / "instruct.jsonl", tmp_path / "pairs.jsonl"
    instruct.write_text('{"instruction": "q", "output": "a"}\n')
    with pytest.raises(ValueError, match=r'line 1: no string "original_answer"; --skip-bad-lines'):
        run("pairs", "--instruct", instruct, "--out", out)
    with pytest.raises(ValueError, match="no row in it that makes a pair"):
        run("pairs", "--instruct", instruct, "--out", out, "--skip-bad-lines")
    assert not out.exists()


# ------------------------------------------------------------------------------------------------ decontaminate


COPY = {"messages": [{"role": "user", "content": "Tell me. " + GSM8K["question"] + " Quickly!"}]}


def test_copies_are_left_out_and_reported(seeds, tmp_path, capsys):
    benchmark, out = tmp_path / "test.jsonl", tmp_path / "clean.jsonl"
    benchmark.write_text('{"question": "Who?"}\n' + json.dumps(GSM8K) + "\n")
    text = seeds.read_text().splitlines()
    seeds.write_text("\n".join([*text[:3], json.dumps(COPY), *text[3:]]) + "\n")
    run("decontaminate", "--data", seeds, "--against", benchmark, "--out", out)
    kept = [line for line in text if json.loads(line) != GSM8K]
    assert out.read_text().splitlines() == kept  # byte for byte, and in order
    report = lines(tmp_path / "clean.dropped.jsonl")
    assert [(entry["line"], entry["benchmark_line"]) for entry in report] == [(4, 2), (22, 2)]
    assert report[0]["file"] == str(seeds)
    assert report[0]["benchmark"] == str(benchmark)
    assert report[0]["ngram"] == "natalia sold 48 clips and then half as many how many did she"
    assert report[0]["reason"] == "shares 13 words in a row with a benchmark"
    assert f"kept {len(kept)} of {len(kept) + 2}, dropped 2; {out}" in capsys.readouterr().out


def test_several_files_go_into_a_directory(seeds, tmp_path):
    benchmark, out = tmp_path / "test.txt", tmp_path / "clean"
    benchmark.write_text(GSM8K["question"])
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"a": "x"}, COPY, {"b": ["y"]}], indent=2))
    run("decontaminate", "--data", seeds, other, "--against", benchmark, "--out", out)
    assert {path.name for path in out.iterdir()} == {"seeds.jsonl", "other.jsonl", "dropped.jsonl"}
    assert lines(out / "other.jsonl") == [{"a": "x"}, {"b": ["y"]}]
    assert [entry["line"] for entry in lines(out / "dropped.jsonl")] == [21, 5]
    with pytest.raises(ValueError, match="is one file for 2; give a directory"):
        run("decontaminate", "--data", seeds, other, "--against", benchmark, "--out", tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"would hold seeds\.jsonl twice"):
        run("decontaminate", "--data", seeds, seeds, "--against", benchmark, "--out", tmp_path / "x")
    with pytest.raises(FileExistsError, match=r"seeds\.jsonl exists already"):
        run("decontaminate", "--data", seeds, "--against", benchmark, "--out", out)


def test_an_ngram_may_be_shorter(seeds, tmp_path):
    benchmark = tmp_path / "test.txt"
    benchmark.write_text("Nobody says: How many did she sell altogether?")
    argv = ["--data", seeds, "--against", benchmark, "--out", tmp_path / "clean.jsonl", "--force", "--ngram"]
    run("decontaminate", *argv, 9)
    assert lines(tmp_path / "clean.dropped.jsonl") == []
    run("decontaminate", *argv, 6)
    assert len(lines(tmp_path / "clean.dropped.jsonl")) == 1


def test_other_numbers_are_kept_if_one_says_so(tmp_path):
    data, benchmark, out = tmp_path / "data.jsonl", tmp_path / "test.jsonl", tmp_path / "clean.jsonl"
    question = GSM8K["question"] + " Say it in words, and then as a number."
    benchmark.write_text(json.dumps({"question": question}) + "\n")
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in (question.replace("48", "50"), question)))
    argv = ["decontaminate", "--data", data, "--against", benchmark, "--out", out, "--force"]
    run(*argv)
    assert [entry["line"] for entry in lines(tmp_path / "clean.dropped.jsonl")] == [1, 2]
    run(*argv, "--keep-other-numbers")
    assert [entry["line"] for entry in lines(tmp_path / "clean.dropped.jsonl")] == [2]


def test_a_failure_in_the_middle_leaves_no_file(seeds, tmp_path):
    benchmark, out = tmp_path / "test.txt", tmp_path / "clean"
    benchmark.write_text(GSM8K["question"])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": "b"}\n{"a"')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: no JSON"):
        run("decontaminate", "--data", seeds, bad, "--against", benchmark, "--out", out)
    assert not [*out.iterdir()]
    run("decontaminate", "--data", seeds, bad, "--against", benchmark, "--out", out, "--skip-bad-lines")
    assert lines(out / "bad.jsonl") == [{"a": "b"}]


def test_bad_input_is_one_line_and_code_2(tmp_path):
    for argv, says in (
        (["bake"], "'bake' is no command; give a command: problems, rephrase, pairs, decontaminate"),
        (["rephrase", "--seeds", "nowhere.jsonl", "--out", "x"], "nowhere.jsonl: No such file or directory"),
    ):
        command = [sys.executable, "-m", "solar.mathdata", *argv]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
