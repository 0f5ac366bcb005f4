"""The six benchmarks of H6, as lm-evaluation-harness asks and marks them: six small functions in one table.

H6 is the average of the Open LLM Leaderboard's first version, with which SOLAR was published (arXiv:2312.15166). Each
function turns one row of a benchmark's own files into a `Question`: the texts that a model is given, the continuations
whose likelihood is asked for, and which of them is right. TASKS says how many solved questions (shots) stand before
each, which mark counts, and where the files come from. A prompt is

    head, shot, blank line, shot, blank line, ..., the question          (a shot is a question and its right answer)

Marks: acc, the likeliest continuation is right; acc_norm, the same with log-likelihoods divided by the number of
characters of the choice; mc2, the share of the probability that the true answers have (arXiv:2109.07958); exact_match,
the number that a generated answer ends in (strict: after the first "#### "; flexible: the last number in it).
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from solar.rows import BadRows, Row, read_any


class Question(NamedTuple):
    """One row. Request i is log p(continuations[i] | contexts[i]); a generated answer continues the only context.

    gold: which choice is right, or for mc2 whether each is true. Both texts together are what a shot shows.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int | tuple[bool, ...]

    def solved(self) -> str:
        """The question with its right answer, as a shot."""
        return self.contexts[self.gold] + self.continuations[self.gold]


class Group(NamedTuple):
    """Questions that are averaged together, and mostly have the text before them in common.

    before: what stands before each. subject: of MMLU, "" elsewhere.
    """

    subject: str
    before: list[str]
    questions: list[Question]


class Task(NamedTuple):
    """A benchmark. `ask` turns a row's value into a Question; `published`: how many rows the whole test set has.

    tests and shot_files: the names that its files go by, of which the first that is there counts.
    """

    title: str
    ask: Callable[[Any], Question]
    shots: int
    metric: str
    published: int
    tests: tuple[str, ...]
    shot_files: tuple[str, ...]
    source: str
    head: str = ""


# ------------------------------------------------------------------------------------------------ the six


def arc(row: dict) -> Question:
    """3 to 5 choices, named by letters or digits. The release nests its fields, the hub's copy does not."""
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        question, listed = question["stem"], question["choices"]
        choices = {"text": [choice["text"] for choice in listed], "label": [choice["label"] for choice in listed]}
    texts, right = [_text(choice) for choice in choices["text"]], _index(choices["label"], row["answerKey"])
    return _choose(f"Question: {_text(question)}\nAnswer:", texts, right)


def hellaswag(row: dict) -> Question:
    """Four endings of a description. What WikiHow left in the texts is cleaned as the harness does."""
    story = f"{_text(row['activity_label'])}: {_text(row['ctx_a'])} {_text(row['ctx_b']).capitalize()}"
    return _choose(_clean(story), [_clean(_text(ending)) for ending in row["endings"]], int(row["label"]))


def _clean(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")  # in one pass, so that a text may begin with a space


def mmlu(fields: list[str]) -> Question:
    """The choices stand in the question, and the continuations are their letters."""
    if len(fields) != 6:
        raise ValueError(f"{len(fields)} fields; wanted are 6, the question, four choices and the letter of the answer")
    question, a, b, c, d, answer = fields
    asked = f"{question.strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
    return _choose(asked, "ABCD", _index(list("ABCD"), answer))


def truthfulqa(row: dict) -> Question:
    """Any number of true and false answers."""
    answers = {_text(answer): label for answer, label in row["mc2_targets"].items()}
    if set(answers.values()) != {0, 1}:
        raise ValueError('"mc2_targets" must hold answers marked 1 and answers marked 0')
    asked = _choose(f"Q: {_text(row['question'])}\nA:", list(answers), 0)
    return asked._replace(gold=tuple(label == 1 for label in answers.values()))


def winogrande(row: dict) -> Question:
    """The two options stand in the contexts, and the rest of the sentence is the continuation of both."""
    before, gap, after = _text(row["sentence"]).partition("_")
    if not gap:
        raise ValueError('no "_" in the "sentence"')
    contexts = tuple(before + _text(row[option]) for option in ("option1", "option2"))
    return Question(contexts, (f" {after.strip()}",) * 2, _index(["1", "2"], row["answer"]))


def gsm8k(row: dict) -> Question:
    """The answer is generated; the continuation here is the right one."""
    if "#### " not in _text(row["answer"]):
        raise ValueError('no "#### " in the "answer"')
    return _choose(f"Question: {_text(row['question'])}\nAnswer:", [row["answer"]], 0)


def _choose(context: str, choices: Sequence[str], right: int) -> Question:
    if not 0 <= right < len(choices):
        raise ValueError(f"choice {right} is marked as right, and there are {len(choices)}")
    return Question((context,) * len(choices), tuple(f" {choice}" for choice in choices), right)


def _index(labels: list, label: Any) -> int:
    if label not in labels:
        raise ValueError(f"the answer is {label!r}, which is none of {', '.join(map(str, labels))}")
    return labels.index(label)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no text")
    value.encode()  # raises a ValueError for half of a surrogate pair
    return value


# TruthfulQA's authors put these before every question (their repository, Apache-2.0, "qa" prompt).
TRUTHFULQA_HEAD = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""
MMLU_HEAD = "The following are multiple choice questions (with answers) about {}.\n\n"
MMLU_SUBJECTS = 57

TASKS = {
    "arc_challenge": Task(
        "ARC-Challenge", arc, 25, "acc_norm", 1172,
        ("test.jsonl", "ARC-Challenge-Test.jsonl"), ("train.jsonl", "ARC-Challenge-Train.jsonl"),
        "allenai.org/data/arc (CC BY-SA 4.0)",
    ),
    "hellaswag": Task(
        "HellaSwag", hellaswag, 10, "acc_norm", 10042,
        ("hellaswag_val.jsonl", "val.jsonl"), ("hellaswag_train.jsonl", "train.jsonl", "fewshot.jsonl"),
        "github.com/rowanz/hellaswag, data/ (MIT)",
    ),
    "mmlu": Task(
        "MMLU", mmlu, 5, "acc", 14042, ("test/*_test.csv",), ("dev/*_dev.csv",),
        "github.com/hendrycks/test, data.tar (MIT)", MMLU_HEAD,
    ),
    "truthfulqa": Task(
        "TruthfulQA", truthfulqa, 0, "mc2", 817, ("mc_task.json",), (),
        "github.com/sylinrl/TruthfulQA, data/mc_task.json (Apache-2.0)", TRUTHFULQA_HEAD,
    ),
    "winogrande": Task(
        "Winogrande", winogrande, 5, "acc", 1267,
        ("dev.jsonl",), ("train_xl.jsonl", "train.jsonl", "fewshot.jsonl"),
        "winogrande.allenai.org, winogrande_1.1.zip (CC BY)",
    ),
    "gsm8k": Task(
        "GSM8K", gsm8k, 5, "exact_match", 1319, ("test.jsonl",), ("train.jsonl",),
        "github.com/openai/grade-school-math, grade_school_math/data/ (MIT)",
    ),
}  # fmt: skip


def parse_tasks(names: str) -> list[str]:
    """The names in "all", or in a text of names and commas, in the order of TASKS. ValueError for an unknown one."""
    asked = list(TASKS) if names == "all" else names.split(",")
    if unknown := [name for name in asked if name not in TASKS]:
        raise ValueError(f"--tasks {names}: {unknown[0]!r} is none of {', '.join(TASKS)}, or all")
    return [name for name in TASKS if name in asked]


# ------------------------------------------------------------------------------------------------ files


def sources() -> str:
    """For each benchmark its folder, its files, and who publishes them."""
    lines = []
    for name, task in TASKS.items():
        files = [" or ".join(names) for names in (task.tests, task.shot_files) if names]
        lines.append(f"  DATA/{name}/: {'; '.join(files)}: {task.source}")
    return "\n".join(lines)


def load(name: str, data: Path, limit: int | None = None, draw: bool = False) -> tuple[list[Group], list[Path]]:
    """The questions of a benchmark in DATA/name, as groups (MMLU: one a subject), and the files they were read from.

    limit: only the first so many of each group. draw: shots that are drawn for each question anew, as the leaderboard
    did it; otherwise the first rows of the file, the same for all, in their order (MMLU: always).
    Raises FileNotFoundError and ValueError, with file and line, for what is missing, damaged or too short for shots.
    """
    task, folder = TASKS[name], data / name
    tests = _find(folder, task.tests, task)
    shots = _find(folder, task.shot_files, task) if task.shots else []
    if name != "mmlu":
        return [_group(task, "", tests[0], shots[0] if shots else None, limit, draw)], [*tests, *shots]
    dev = {path.name.removesuffix("_dev.csv"): path for path in shots}
    groups = []
    for path in tests:
        subject = path.name.removesuffix("_test.csv")
        if subject not in dev:
            raise FileNotFoundError(f"{folder}/dev/{subject}_dev.csv: no such file, and {path.name} needs its shots")
        groups.append(_group(task, subject, path, dev.pop(subject), limit, draw=False))
    if dev:
        raise FileNotFoundError(f"{folder}/test/{min(dev)}_test.csv: no such file, but there are shots for it")
    return groups, [*tests, *shots]


def _find(folder: Path, names: tuple[str, ...], task: Task) -> list[Path]:
    for name in names:
        if found := sorted(folder.glob(name)):
            return found
    raise FileNotFoundError(f"{folder}: no {' or '.join(names)}; {task.title} is published at {task.source}")


def _group(task: Task, subject: str, tests: Path, shots: Path | None, limit: int | None, draw: bool) -> Group:
    questions = read(task, tests)
    kept = len(questions) if limit is None else min(limit, len(questions))
    head = task.head.format(subject.replace("_", " "))
    if shots is None:
        return Group(subject, [head] * kept, questions[:kept])
    pool = [question.solved() + "\n\n" for question in read(task, shots, None if draw else task.shots)]
    if len(pool) < task.shots:
        raise ValueError(f"{shots}: {len(pool)} rows, and {task.title} shows {task.shots} before each question")
    if draw:
        chosen = drawn_shots(len(questions), len(pool), task.shots)[:kept]
        return Group(subject, [head + "".join(pool[i] for i in indices) for indices in chosen], questions[:kept])
    return Group(subject, [head + "".join(pool)] * kept, questions[:kept])


def drawn_shots(questions: int, pool: int, shots: int) -> list[list[int]]:
    """Which rows of a pool stand before each question, as the leaderboard's harness drew them.

    One stream of seed 42 shuffles the questions and then draws for one after the other.
    """
    rng, order, chosen = random.Random(42), list(range(questions)), [[]] * questions
    rng.shuffle(order)
    for index in order:
        chosen[index] = rng.sample(range(pool), shots)
    return chosen


def read(task: Task, path: Path, count: int | None = None) -> list[Question]:
    """The questions of one file, or its first `count`. ValueError names a line that is none, or a file without any."""
    bad = BadRows(skip=True)
    questions = [_ask(task, row) for row in islice(read_any(path, bad), count)]
    if bad.found:
        raise ValueError(f"{bad.found[0]} (cut short, damaged or another format)")
    if not questions:
        raise ValueError(f"{path}: no rows in it")
    return questions


def _ask(task: Task, row: Row) -> Question:
    try:
        return task.ask(row.value)
    except KeyError as error:
        reason = f"no field {error.args[0]!r}"
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    raise ValueError(f"{row.path}, line {row.line}: no question of {task.title}: {reason}")


# ------------------------------------------------------------------------------------------------ marks


def mark(metric: str, question: Question, logps: Sequence[float]) -> dict[str, float]:
    """{"choice": the likeliest, "score": what counts} of log p of each continuation; the first maximum wins.

    Of acc_norm also "acc", without the division.
    """
    if metric == "mc2":
        highest = max(logps)
        shares = [math.exp(logp - highest) for logp in logps]
        true = math.fsum(share for share, label in zip(shares, question.gold, strict=True) if label)
        return {"choice": logps.index(highest), "score": true / math.fsum(shares)}
    acc = float(logps.index(max(logps)) == question.gold)
    if metric == "acc":
        return {"choice": logps.index(max(logps)), "score": acc}
    # The space before a choice is not the choice's; an empty one counts as one character.
    per_character = [logp / max(len(text) - 1, 1) for logp, text in zip(logps, question.continuations, strict=True)]
    choice = per_character.index(max(per_character))
    return {"choice": choice, "score": float(choice == question.gold), "acc": acc}


STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
STOPS = ("Question:", "</s>", "<|im_end|>")
LEADERBOARD_STOP = ":"  # where its version of the harness cut answers, which cost some models most of theirs
INVALID = "[invalid]"
IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


def cut(text: str, stops: Iterable[str] = STOPS) -> str:
    """A generated answer up to the first stop."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def extract_strict(text: str) -> str:
    """What follows the first "#### "; INVALID if nothing does."""
    found = STRICT.search(text)
    return found[1] if found else INVALID


def extract_flexible(text: str) -> str:
    """The last number, or what looks like one; INVALID without one."""
    found = [match.group() for match in FLEXIBLE.finditer(text)]
    return found[-1] if found else INVALID


def mark_answer(question: Question, text: str) -> dict[str, Any]:
    """{"score": strict, "flexible": ...} of a generated answer; 18.0 is not 18, as texts are compared."""
    gold = _plain(question.continuations[0])
    strict, flexible = extract_strict(text), extract_flexible(text)
    marks = {"score": float(_plain(strict) == gold), "flexible": float(_plain(flexible) == gold)}
    return marks | {"strict_answer": strict, "flexible_answer": flexible}


def _plain(text: str) -> str:
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()


class Score(NamedTuple):
    """A mean with its standard error, in shares of 1, over n questions."""

    mean: float
    stderr: float
    n: int


def average(values: Sequence[float]) -> Score:
    """Mean and standard error, from the spread of the sample; of a single value that is unknown, NaN."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.fsum((value - mean) ** 2 for value in values)
    return Score(mean, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan, n)


def mean_of_means(scores: Sequence[Score]) -> Score:
    """The plain mean of group means, each group counting the same, as the leaderboard averaged MMLU's subjects."""
    mean = math.fsum(score.mean for score in scores) / len(scores)
    stderr = math.sqrt(math.fsum(score.stderr**2 for score in scores)) / len(scores)
    return Score(mean, stderr, sum(score.n for score in scores))


if __name__ == "__main__":
    print("The benchmarks' files, where --data DATA looks for them, and who publishes them:\n" + sources())
