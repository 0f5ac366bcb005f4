"""Synthetic mathematics data: Math-Instruct, Math-Alignment, and keeping benchmarks out of them.

SOLAR's two mathematics sets (arXiv:2312.15166, section 3) are made of problems whose questions and answers are
rephrased as in MetaMath (arXiv:2309.12284, section 3): a rephrasing is kept where its final answer is the seed's.

    python -m solar.mathdata problems --out SEEDS.jsonl             seed problems, generated
    python -m solar.mathdata rephrase --seeds FILES... --out FILE   Math-Instruct, by a local model or by rules
    python -m solar.mathdata pairs --instruct FILE --out FILE       Math-Alignment: rephrased against original answers
    python -m solar.mathdata decontaminate --data FILES... --against FILES... --out FILE

A row of Math-Instruct is {"instruction": rephrased question, "output": rephrased answer, "original_question",
"original_answer", "answer": the final one}; of Math-Alignment {"prompt": rephrased question, "chosen": rephrased
answer, "rejected": original answer, "original_question"}. By its original question a row of either is held out from
training, with all rephrasings of it. Problems that are held out (solar/problems.py) come into neither: their operands
decide.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from solar import cli, contamination, problems
from solar.checkpoint import choose_device, load_model
from solar.model import Transformer
from solar.rephrase import (
    ASK_ANSWER,
    ASK_QUESTION,
    Kept,
    answer_ends,
    clean_question,
    finish_answer,
    held_out,
    question_ends,
    question_fault,
    rephrase,
)
from solar.rows import BadRows, read_rows
from solar.sampling import generate
from solar.seeds import Seed, read_seeds, text_fields
from solar.tokenizer import TEMPLATES, Tokenizer, encode_prompt, end_ids

SHOWN = 10  # bad lines that are named, at most
DRAWS = 100_000  # without a new problem: then there is none

# ------------------------------------------------------------------------------------------------ files


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _report_bad(bad: BadRows) -> None:
    for reason in bad.found[:SHOWN]:
        print(f"note: {reason}", file=sys.stderr)
    if bad.found:
        more = f", {len(bad.found) - SHOWN} of them not named" if len(bad.found) > SHOWN else ""
        print(f"{len(bad.found)} bad lines left out{more}")


# ------------------------------------------------------------------------------------------------ problems


@dataclass
class ProblemsOptions:
    """Flags of `problems`."""

    out: str = cli.flag(help="jsonl file to write", metavar="FILE")
    count: int = cli.flag(10_000, help="problems to write")
    seed: int = cli.flag(0, help="for other problems")
    families: list[str] = cli.flag([], help=f"only these: {', '.join(problems.FAMILIES)}", metavar="FAMILY")
    force: bool = cli.flag(False, help="replace the output if it exists")


def make_problems(options: ProblemsOptions) -> None:
    """Write generated seed problems, none of them held out, no two alike."""
    if unknown := [name for name in options.families if name not in problems.FAMILIES]:
        raise ValueError(f"--families {unknown[0]!r} is not one of {', '.join(problems.FAMILIES)}")
    if options.count < 1:
        raise ValueError(f"--count {options.count}: at least 1 problem is needed")
    out = Path(options.out)
    cli.check_output_file(out, options.force, [])
    seen, draws = set(), 0
    with cli.publish_file(out) as file:
        for problem in problems.generate(options.seed, "train"):
            draws += 1
            if draws > DRAWS:
                raise ValueError(f"--count {options.count}: there are few more than {len(seen)} of these problems")
            if problem.question in seen or (options.families and problem.family not in options.families):
                continue
            seen.add(problem.question)
            draws = 0
            answer = f"{problem.solution} {problems.MARKER} {problem.answer}"
            told = {"family": problem.family, "operands": problem.operands, "phrasing": problem.phrasing}
            file.write(_line({"question": problem.question, "answer": answer, **told}))
            if len(seen) == options.count:
                break
    print(f"{len(seen):,} problems")
    print(out)


# ------------------------------------------------------------------------------------------------ rephrase


@dataclass
class RephraseOptions:
    """Flags of `rephrase`."""

    seeds: list[str] = cli.flag(help="problems with answers: jsonl or json files", metavar="FILES")
    out: str = cli.flag(help="jsonl file to write: Math-Instruct", metavar="FILE")
    model: str | None = cli.flag(None, help="model that rephrases and answers (default: rules)", metavar="DIR")
    template: Literal[*TEMPLATES] = cli.flag("solar", help="chat template of the model")
    count: int | None = cli.flag(None, help="stop when so many rows are kept")
    per_seed: int = cli.flag(1, help="rephrasings to try of each problem", metavar="K")
    seed: int = cli.flag(0, help="of the order of the problems, and of what is drawn")
    batch_size: int = cli.flag(8, help="problems that the model rephrases at once")
    max_new_tokens: int = cli.flag(320, help="of a question or an answer, at most", metavar="N")
    temperature: float = cli.flag(0.7, help="of the model; 0 takes the likeliest token", metavar="X")
    top_p: float = cli.flag(0.95, help="draw among the likeliest tokens that reach P together", metavar="P")
    device: Literal["auto", "cpu", "cuda", "mps"] = cli.flag("auto", help="where the model runs; auto: cuda if any")
    dtype: str | None = cli.flag(None, help="bfloat16, float16 or float32 (default: as stored)")
    skip_bad_lines: bool = cli.flag(False, help="count rows that are no problem instead of stopping")
    force: bool = cli.flag(False, help="replace the output if it exists")


def make_instruct(options: RephraseOptions) -> None:
    """Rephrase problems and their answers, and keep what has the right final answer."""
    for name in ("count", "per_seed", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    out, paths = Path(options.out), [Path(path) for path in options.seeds]
    cli.check_output_file(out, options.force, paths)
    bad = BadRows(options.skip_bad_lines)
    seeds = read_seeds(paths, bad)
    _report_bad(bad)
    usable = [seed for seed in seeds if not held_out(seed.question)]
    if len(usable) < len(seeds):
        print(f"{len(seeds) - len(usable)} held-out problems left out")
    if not usable:
        raise ValueError("all problems are held out from training; give others")
    random.Random(options.seed).shuffle(usable)
    attempts = [(seed, number) for number in range(options.per_seed) for seed in usable]
    if options.model is None:
        kept = Kept([], Counter())
        for seed, number in attempts:
            if kept.full(options.count):
                break
            kept.take(seed, *rephrase(seed, number, options.seed))
        kept.check()
        with cli.publish_file(out) as file:
            file.writelines(map(_line, kept.rows))
    else:
        kept = _by_model(options, out, attempts)
    print(kept.report())
    print(out)


# ------------------------------------------------------------------------------------------------ by a model


def _by_model(options: RephraseOptions, out: Path, attempts: list[tuple[Seed, int]]) -> Kept:
    """Each batch, when it is done, is a line of OUT.partial, from which an interrupted run with the same model, seeds
    and options goes on, to the file that it would have written."""
    partial = out.with_name(out.name + ".partial")
    rephraser = Rephraser(options)
    key = rephraser.key(attempts)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{partial} is being written by another run; wait, or give another --out") from None
        kept, done = _resume(partial, file, key)
        for first in range(done, len(attempts), options.batch_size):
            if kept.full(options.count):
                break
            batch = attempts[first : first + options.batch_size]
            rows, dropped = len(kept.rows), kept.dropped.copy()
            rephraser.rephrase([seed for seed, _ in batch], first, kept)
            new = {"done": first + len(batch), "rows": kept.rows[rows:], "dropped": kept.dropped - dropped}
            head = "" if first else _line({"key": key})
            file.write((head + _line(new)).encode())
            file.flush()
            os.fsync(file.fileno())
            print(f"{first + len(batch):,} of {len(attempts):,} tried, {len(kept.rows):,} kept", file=sys.stderr)
        if options.count is not None:
            del kept.rows[options.count :]
        if kept.rows:
            with cli.publish_file(out) as published:
                published.writelines(map(_line, kept.rows))
        partial.unlink()
    kept.check()
    return kept


def _resume(partial: Path, file, key: str) -> tuple[Kept, int]:
    """(what a run with the same key has kept, attempts that it has made); what it was writing when it ended is cut off.

    Raises ValueError for a file that a run with another key has begun.
    """
    file.seek(0)
    rows, dropped, done, end = [], Counter(), 0, 0
    for number, line in enumerate(file):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            if number:
                done, dropped = entry["done"], dropped + Counter(entry["dropped"])
                rows += entry["rows"]
            elif entry["key"] != key:
                raise ValueError(
                    f"{partial} was begun with another model, other seeds or options: remove it, or give another --out"
                )
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(f"{partial}, line {number + 1}: not what this command writes; remove the file") from None
        end += len(line)
    file.truncate(end if done else 0)
    if done:
        print(f"{partial}: going on after {done:,} rephrasings, {len(rows):,} kept", file=sys.stderr)
    return Kept(rows, dropped), done


class Rephraser:
    """A model that rephrases questions, and answers what it has written."""

    def __init__(self, options: RephraseOptions):
        device = choose_device(options.device)
        self.options, self.tokenizer = options, Tokenizer(options.model)
        self.model: Transformer = load_model(options.model, dtype=options.dtype, device=device)
        ends = self.model.config.eos_token_id
        ends = {*(ends if isinstance(ends, tuple) else [ends])}
        self.ends = sorted((ends | end_ids(self.tokenizer, options.template)) - {None})

    def key(self, attempts: list[tuple[Seed, int]]) -> str:
        """The hash of everything that the rows depend on."""
        ignored = ("seeds", "out", "model", "force", "skip_bad_lines", "count", "device")
        options = {name: value for name, value in asdict(self.options).items() if name not in ignored}
        files = sorted(path for path in Path(self.options.model).iterdir() if path.is_file())
        model = [(path.name, cli.file_sha256(path)) for path in files]
        content = [model, options, attempts, ASK_QUESTION, ASK_ANSWER]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def rephrase(self, seeds: list[Seed], first: int, kept: Kept) -> None:
        """Try one rephrasing of each seed; `first` is the number of the first attempt, on which the draws depend."""
        draws = (self.options.seed << 32) + 2 * first
        asked, questions = [], []
        written = self._ask(ASK_QUESTION, [seed.question for seed in seeds], question_ends, draws, kept)
        for seed, text in zip(seeds, written, strict=True):
            question = clean_question(text or "")
            if text is not None and (fault := question_fault(seed, question)):
                kept.dropped[fault] += 1
            elif text is not None:
                asked.append(seed)
                questions.append(question)
        answers = self._ask(ASK_ANSWER, questions, answer_ends, draws + len(seeds), kept)
        for seed, question, answer in zip(asked, questions, answers, strict=True):
            if answer is not None:
                kept.take(seed, question, finish_answer(seed, answer))

    def _ask(
        self, prompt: str, questions: list[str], ends: Callable[[str], bool], draws: int, kept: Kept
    ) -> list[str | None]:
        """What the model writes for each question; None, and a reason in `kept`, where there is no room or no end."""
        options, tokenizer, written = self.options, self.tokenizer, [None] * len(questions)
        prompts = [encode_prompt(tokenizer, options.template, prompt.format(question=text)) for text in questions]
        room = self.model.config.max_position_embeddings - options.max_new_tokens
        fits = [row for row, ids in enumerate(prompts) if len(ids) <= room]
        kept.dropped["too long for the model"] += len(prompts) - len(fits)
        if not fits:
            return written
        texts, ended = [b""] * len(fits), set()

        def on_token(row: int, token: int) -> bool:
            texts[row] += tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
            if ends(texts[row].decode(errors="replace")):
                ended.add(row)
            return row in ended

        settings = {"temperature": options.temperature, "top_p": options.top_p, "eos_id": self.ends, "seed": draws}
        prompts = [prompts[row] for row in fits]
        new = generate(self.model, prompts, options.max_new_tokens, **settings, on_token=on_token)
        for at, (row, ids) in enumerate(zip(fits, new, strict=True)):
            if len(ids) == options.max_new_tokens and at not in ended:
                kept.dropped["not finished"] += 1
            else:
                written[row] = texts[at].decode(errors="replace").strip()
        return written


# ------------------------------------------------------------------------------------------------ pairs


@dataclass
class PairsOptions:
    """Flags of `pairs`."""

    instruct: str = cli.flag(help="Math-Instruct, as rephrase wrote it", metavar="FILE")
    out: str = cli.flag(help="jsonl file to write: Math-Alignment", metavar="FILE")
    skip_bad_lines: bool = cli.flag(False, help="count rows that cannot be used instead of stopping")
    force: bool = cli.flag(False, help="replace the output if it exists")


def make_pairs(options: PairsOptions) -> None:
    """Write preference pairs: the rephrased answer is chosen, the original one rejected."""
    path, out = Path(options.instruct), Path(options.out)
    cli.check_output_file(out, options.force, [path])
    bad, written, dropped = BadRows(options.skip_bad_lines), 0, Counter()
    with cli.publish_file(out) as file:
        for row in read_rows(path, bad):
            try:
                prompt, chosen, rejected = text_fields(row.value, ("instruction", "output", "original_answer"))
                named = ("original_question",) if "original_question" in row.value else ()
                origin = {name: text_fields(row.value, (name,))[0] for name in named}
            except ValueError as error:
                bad.add(path, row.line, str(error))
                continue
            if chosen == rejected:
                dropped["chosen equals rejected"] += 1
            elif held_out(prompt):
                dropped["a held-out problem"] += 1
            else:
                file.write(_line({"prompt": prompt, "chosen": chosen, "rejected": rejected} | origin))
                written += 1
        reasons = "".join(f"; {reason}: {count:,}" for reason, count in dropped.items())
        _report_bad(bad)
        if not written:
            raise ValueError(f"{path}: no row in it that makes a pair{reasons}")
    print(f"{written:,} pairs{reasons}")
    print(out)


# ------------------------------------------------------------------------------------------------ decontaminate


@dataclass
class DecontaminateOptions:
    """Flags of `decontaminate`."""

    data: list[str] = cli.flag(help="training examples: jsonl or json files, objects of any shape", metavar="FILES")
    against: list[str] = cli.flag(help="benchmarks: jsonl, json, csv or text files", metavar="FILES")
    out: str = cli.flag(help="what to write: a .jsonl file, or a directory for several", metavar="PATH")
    ngram: int = cli.flag(contamination.WORDS, help="words in a row that may not be shared; 13 is GPT-3's", metavar="N")
    keep_other_numbers: bool = cli.flag(
        False, help="keep problems that lack numbers of the benchmark's; this misses copies, see solar/contamination.py"
    )
    skip_bad_lines: bool = cli.flag(False, help="count rows that cannot be read instead of stopping")
    force: bool = cli.flag(False, help="replace outputs that exist")


def decontaminate(options: DecontaminateOptions) -> None:
    """Leave out the examples that share a long n-gram with a benchmark, and report each in a file of its own."""
    paths, out = [Path(path) for path in options.data], Path(options.out)
    against = [Path(path) for path in options.against]
    outputs, report = _outputs(paths, out)
    for output in [*outputs, report]:
        cli.check_output_file(output, options.force, [*paths, *against])
    bad = BadRows(options.skip_bad_lines)
    texts = contamination.read_texts(against, bad)
    benchmarks = contamination.Benchmarks(texts, options.ngram, options.keep_other_numbers)
    print(f"{benchmarks.texts:,} texts of benchmarks, and {benchmarks.short:,} that are too short to be looked for")
    progress = cli.Progress("decontaminate", sum(path.stat().st_size for path in paths))
    counts = []
    with contextlib.ExitStack() as stack:
        reported = stack.enter_context(cli.publish_file(report))
        for path, output in zip(paths, outputs, strict=True):
            file = stack.enter_context(cli.publish_file(output))
            counts.append([0, 0])
            for row, shared in contamination.sift(path, benchmarks, bad):
                progress.advance(len(row.text) + 1)
                counts[-1][shared is not None] += 1
                if shared is None:
                    file.write(row.text + "\n" if "\n" not in row.text else json.dumps(row.value) + "\n")
                    continue
                reason = f"shares {len(shared.words.split())} words in a row with a benchmark"
                entry = {"file": str(path), "line": row.line, "reason": reason, "ngram": shared.words}
                reported.write(_line(entry | {"benchmark": str(shared.path), "benchmark_line": shared.line}))
    progress.close()
    _report_bad(bad)
    for path, output, (kept, dropped) in zip(paths, outputs, counts, strict=True):
        print(f"{path}: kept {kept:,} of {kept + dropped:,}, dropped {dropped:,}; {output}")
    print(f"what was dropped: {report}")
    print(out)


def _outputs(paths: list[Path], out: Path) -> tuple[list[Path], Path]:
    """(the file for each data file, the file for the report)"""
    if out.suffix == ".jsonl":
        if len(paths) > 1:
            raise ValueError(f"--out {out} is one file for {len(paths)}; give a directory")
        return [out], out.with_suffix(".dropped.jsonl")
    names = [f"{path.stem}.jsonl" for path in paths]
    if twice := {name for name in ["dropped.jsonl", *names] if ["dropped.jsonl", *names].count(name) > 1}:
        raise ValueError(f"--out {out} would hold {min(twice)} twice; decontaminate these files one by one")
    return [out / name for name in names], out / "dropped.jsonl"


COMMANDS = {
    "problems": (ProblemsOptions, make_problems),
    "rephrase": (RephraseOptions, make_instruct),
    "pairs": (PairsOptions, make_pairs),
    "decontaminate": (DecontaminateOptions, decontaminate),
}


def main() -> None:
    cli.run_command("python -m solar.mathdata", COMMANDS)


if __name__ == "__main__":
    cli.run(main)
