"""Generated instructions: a function of the seed, split by task, in shapes that the readers take."""

import json
from itertools import islice

import pytest

from solar import chats, instructions


def taken(split: str, seed: int = 0, count: int = 3000) -> list[instructions.Task]:
    return list(islice(instructions.generate(seed, split), count))


def test_a_seed_gives_the_same_tasks_and_another_gives_others():
    assert taken("train", count=50) == taken("train", count=50)
    assert taken("train", count=50) != taken("train", 1, count=50)


def test_no_held_out_task_is_trained_on_whatever_the_seed():
    key = lambda task: (task.instruction, task.context)
    trained = {key(task) for seed in range(3) for task in taken("train", seed)}
    held_out = {key(task) for seed in range(3) for task in taken("heldout", seed)}
    assert not trained & held_out
    assert len(held_out) > 100


def test_every_kind_appears_and_its_answers_are_right():
    tasks = taken("train")
    assert len({task.kind for task in tasks}) == len(instructions.KINDS)
    for task in tasks:
        assert task.answer != task.wrong, task
        numbers = [int(word) for word in task.instruction.replace(",", " ").replace("?", " ").replace(".", " ").split()
                   if word.isdecimal()]  # fmt: skip
        items = task.context.split(", ")
        expected = {
            "larger": lambda n=numbers: str(max(n)),
            "parity": lambda n=numbers: ("even", "odd")[n[0] % 2],
            "count": lambda n=numbers: ", ".join(map(str, range(n[0], n[1] + 1))),
            "following": lambda n=numbers: str(n[0] + 1),
            "repeat": lambda n=numbers, task=task: " ".join([task.context] * n[0]),
            "greet": lambda task=task: f"Hello, {task.instruction.split()[-1][:-1]}!",
            "reverse": lambda items=items: ", ".join(reversed(items)),
            "first": lambda items=items: items[0],
        }[task.kind]()
        assert task.answer == expected, task


@pytest.mark.parametrize("kind", ["alpaca", "orca", "feedback"])
def test_the_files_are_what_the_readers_take(kind, tmp_path, capsys):
    out = tmp_path / f"{kind}.jsonl"
    options = instructions.Options(out=str(out), count=40)
    {"alpaca": instructions.make_alpaca, "orca": instructions.make_orca, "feedback": instructions.make_feedback}[kind](
        options
    )
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 40
    tasks = list(islice(instructions.generate(0, "train"), 40))
    for row, task in zip(rows, tasks, strict=True):
        chat = chats.parse_pair(row) if kind == "feedback" else chats.parse_chat(row)
        assert chat.answers[0].startswith(task.answer)
        assert (kind == "orca") == (chat.answers[0] != task.answer)
        assert (kind == "orca") == (chat.messages[0][0] == "system")
    with pytest.raises(FileExistsError, match="exists already"):
        instructions.make_alpaca(options)


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--count 0"):
        instructions.make_orca(instructions.Options(out=str(tmp_path / "none.jsonl"), count=0))
    assert not any(tmp_path.iterdir())
