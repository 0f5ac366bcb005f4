"""H6: the six benchmarks of the Open LLM Leaderboard, measured as lm-evaluation-harness does it:

    python -m solar.evaluate --model DIR --data DIR --tasks all --out report.json     (or under torchrun, on many GPUs)

DATA holds a folder a benchmark, with the files that its authors publish; `solar/tasks.py` lists them, `--help` too.
Two protocols. "harness" is lm-evaluation-harness 0.4 with its first_n sampler: every question has the same shots, so
they are read once, and BOS stands before a text if the tokenizer puts it there. "leaderboard" is what the leaderboard
ran (commit b281b09): shots drawn for each question anew, no BOS, and GSM8K's answers cut at the first colon.

The report holds the table, every question's log-likelihoods or answer, what they were made of, and in what the run was
another one than the protocol says. A run that was stopped goes on when started again with the same model, data and
settings. Each rank holds the whole model and reads every n-th batch, so any number of ranks writes the same report.
"""

import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kernels import CHOICES, select
from solar import cli, dist, perplexity, tasks
from solar.answers import Run
from solar.checkpoint import CheckpointReader, load_model, parse_dtype
from solar.journal import Journal
from solar.model import Transformer
from solar.plan import GRAMMAR, parse_plan, to_json
from solar.scoring import Limits
from solar.standin import MARKER as MADE_UP
from solar.tasks import TASKS, Group, Score
from solar.tokenizer import Tokenizer

FORMAT = "solar evaluation, version 1"
BASE = str(Path(__file__).parent / "assets/base")
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
BATCH_QUESTIONS = 256
CACHE_BYTES_ON_CPU = 2 << 30
LOGITS_BYTES = 2 << 30


@dataclass
class Options:
    """What to measure."""

    model: str = cli.flag(BASE, help="model directory", metavar="DIR")
    plan: str | None = cli.flag(None, help=f"grow it while loading: {GRAMMAR}")
    data: str | None = cli.flag(
        None, help="directory of the benchmarks' own files, which `python -m solar.tasks` lists", metavar="DIR"
    )
    tasks: str = cli.flag("all", help=f"all, or some of {','.join(TASKS)}", metavar="NAME,...")
    out: str = cli.flag("out/evaluate/report.json", help="report to write", metavar="FILE.json")
    protocol: Literal["harness", "leaderboard"] = cli.flag("harness", help="whose shots, BOS and stops")
    limit: int | None = cli.flag(None, help="only the first N questions of each benchmark, of MMLU of each subject")
    bos: Literal["auto", "yes", "no"] = cli.flag("auto", help="BOS before each text; auto: as the protocol has it")
    max_length: int | None = cli.flag(None, help="tokens that the model may read (default: what its config says)")
    max_new_tokens: int = cli.flag(256, help="longest answer to a question of GSM8K")
    batch_size: int | None = cli.flag(None, help="questions read at once, instead of as many tokens as fit")
    batch_tokens: int | None = cli.flag(None, help=f"tokens read at once (default: {BATCH_TOKENS['cpu']}, "
                                        f"on a GPU {BATCH_TOKENS['cuda']})")  # fmt: skip
    no_reuse: bool = cli.flag(False, help="read every request whole, sharing nothing: slow, for checking")
    perplexity: list[str] = cli.flag(
        [], help="measure the perplexity of these texts instead, and print it", metavar="FILE"
    )
    device: str = cli.flag("auto", help="cuda, cpu, or auto: a GPU if there is one")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = cli.flag("auto", help="auto: bf16 on a GPU, fp32 elsewhere")
    kernels: Literal[CHOICES] = cli.flag("auto", help="which implementation of the operations")
    force: bool = cli.flag(False, help="replace a report that is there")


# ------------------------------------------------------------------------------------------------ marks


def mark(name: str, groups: list[Group], results: list[list[Any]]) -> tuple[dict[str, Any], list[dict]]:
    """({"score", "stderr", "n", ...} of a benchmark, what became of each of its questions), by `tasks`' marks."""
    metric = TASKS[name].metric
    items, scores, others = [], [], {"acc": [], "flexible": []}
    for group, answers in zip(groups, results, strict=True):
        marks = []
        for index, (question, answer) in enumerate(zip(group.questions, answers, strict=True)):
            if metric == "exact_match":
                found = {"answer": answer} | tasks.mark_answer(question, answer)
            else:
                found = {"loglikelihoods": answer} | tasks.mark(metric, question, answer)
            items.append(({"subject": group.subject} if group.subject else {}) | {"row": index} | found)
            marks.append(found)
        scores.append(tasks.average([found["score"] for found in marks]))
        for other, values in others.items():
            values += [found[other] for found in marks if other in found]
    summary = _summary(scores[0])
    if name == "mmlu":
        summary = _summary(tasks.mean_of_means(scores)) | {
            "aggregation": "plain mean over subjects",
            "over_questions": _summary(tasks.average([item["score"] for item in items])),
            "subjects": {group.subject: _summary(score) for group, score in zip(groups, scores, strict=True)},
        }
    more = {other: _summary(tasks.average(values)) for other, values in others.items() if values}
    return {"metric": metric, "shots": TASKS[name].shots} | summary | more, items


def _summary(score: Score) -> dict[str, float | int | None]:
    return {"score": score.mean, "stderr": None if math.isnan(score.stderr) else score.stderr, "n": score.n}


def table(results: dict[str, dict]) -> str:
    """What `mark` gave for each benchmark, to be read, in per cent."""
    lines = [f"{'benchmark':<24} {'shots':>5}  {'metric':<20} {'score':>6}  {'stderr':>6}  {'n':>6}"]

    def line(title: str, shots: Any, metric: str, entry: dict) -> str:
        stderr = "-" if entry["stderr"] is None else f"{100 * entry['stderr']:.2f}"
        return f"{title:<24} {shots:>5}  {metric:<20} {100 * entry['score']:6.2f}  {stderr:>6}  {entry['n']:>6,}"

    for name, entry in results.items():
        metric = f"{entry['metric']}, strict" if "flexible" in entry else entry["metric"]
        title = f"MMLU, {len(entry['subjects'])} subjects" if name == "mmlu" else TASKS[name].title
        lines.append(line(title, entry["shots"], metric, entry))
        if name == "mmlu":
            lines.append(line("  over all questions", "", "acc", entry["over_questions"]))
        if "flexible" in entry:
            lines.append(line("", "", "  flexible", entry["flexible"]))
    mean = sum(entry["score"] for entry in results.values()) / len(results)
    title = "H6, average of the six" if len(results) == len(TASKS) else f"average of these {len(results)}"
    return "\n".join([*lines, f"{title:<24} {'':>5}  {'':<20} {100 * mean:6.2f}"])


# ------------------------------------------------------------------------------------------------ the command


def make(options: Options, world: dist.World) -> None:
    """Measure, print the table and write the report."""
    say = print if world.rank == 0 else lambda *_, **__: None
    out, reader = Path(options.out), CheckpointReader(options.model)
    names = check(options, reader)
    cli.check_output_file(out, options.force)
    data, drawn = Path(options.data), options.protocol == "leaderboard"
    loaded = {name: tasks.load(name, data, options.limit, drawn) for name in names}
    tokenizer = Tokenizer(options.model)
    bos = choose_bos(options, tokenizer)
    select(options.kernels)
    dtype = parse_dtype({"auto": "bf16" if world.device.type == "cuda" else "fp32"}.get(options.dtype, options.dtype))
    model = load_model(options.model, dtype, world.device, options.plan).eval()
    max_length = options.max_length or model.config.max_position_embeddings
    settings = {
        "protocol": options.protocol, "dtype": str(dtype).removeprefix("torch."), "bos": bos, "max_length": max_length,
        "max_new_tokens": options.max_new_tokens,
    }  # fmt: skip
    made_of = dist.from_all_ranks(fingerprints(options, reader, tokenizer) if world.rank == 0 else None, world)[0]
    say(f"model       {options.model}{f' grown by {options.plan}' if options.plan else ''}, {settings['dtype']}, "
        f"{'with' if bos else 'without'} BOS, up to {max_length:,} tokens", flush=True)  # fmt: skip
    # BOS and length are in the ids of each question, by which its result is kept.
    header = {"format": FORMAT, **made_of} | {key: settings[key] for key in ("protocol", "dtype", "max_new_tokens")}
    journal, written = Journal(out, header) if world.rank == 0 else None, False
    try:
        if journal and journal.other:
            print(f"note: {journal.path} was of another run ({journal.other}); begun anew", file=sys.stderr)
        done = dict(dist.from_all_ranks(journal and journal.results, world)[0])
        if done:
            say(f"going on    {len(done):,} questions are answered already", flush=True)
        stops = (tasks.LEADERBOARD_STOP, "Question") if drawn else tasks.STOPS
        run = Run(model, tokenizer, world, journal, done, bos, max_length, options.max_new_tokens, stops,
                  choose_limits(options, model, world), not options.no_reuse)  # fmt: skip
        results, items, seconds = {}, {}, {}
        for name, (groups, _) in loaded.items():
            start = time.monotonic()
            results[name], items[name] = mark(name, groups, run.answer(name, groups))
            seconds[name] = round(time.monotonic() - start, 3)
        deviations = list_deviations(options, loaded, run, tokenizer)
        if journal:
            digests = {
                str(path.relative_to(data)): cli.file_sha256(path)[:16]
                for _, paths in loaded.values()
                for path in paths
            }
            with cli.publish_file(out) as file:
                json.dump({
                    "format": FORMAT, "results": results, "settings": settings, "deviations": deviations,
                    "model": {"path": options.model, **made_of}, "data": digests, "seconds": seconds,
                    "ranks": world.size, "versions": versions(), "options": asdict(options), "items": items,
                }, file, allow_nan=False)  # fmt: skip
            written = True
    finally:
        if journal:
            journal.close(written)
    say(f"\n{table(results)}")
    for line in deviations:
        say(f"note: {line}")
    say(out)


def fingerprints(options: Options, reader: CheckpointReader, tokenizer: Tokenizer) -> dict[str, str | list | None]:
    """What was measured, told by what it holds: a plan's file may have another plan the next time."""
    return {
        "model": reader.fingerprint(whole=True),
        "plan": options.plan,
        "layers": to_json(parse_plan(options.plan, reader.config.num_hidden_layers)) if options.plan else None,
        "tokenizer": cli.file_sha256(tokenizer.path)[:16],
    }


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def check(options: Options, reader: CheckpointReader) -> list[str]:
    """The names of the benchmarks. ValueError for options that cannot be, FileNotFoundError for no data."""
    for name in ("limit", "max_length", "max_new_tokens", "batch_size", "batch_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    names = tasks.parse_tasks(options.tasks)
    length = options.max_length or reader.config.max_position_embeddings
    if length > reader.config.max_position_embeddings:
        raise ValueError(
            f"--max-length {length}: the model has room for {reader.config.max_position_embeddings} positions "
            f"(max_position_embeddings of {options.model})"
        )
    if "gsm8k" in names and options.max_new_tokens >= length:
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: the model reads {length} tokens in all")
    if options.data is None:
        raise ValueError(
            "--data is needed: a directory of the benchmarks' own files, which `python -m solar.tasks` lists"
        )
    if not Path(options.data).is_dir():
        what = "is not a directory" if Path(options.data).exists() else "no such directory"
        raise FileNotFoundError(f"--data {options.data}: {what}; `python -m solar.tasks` lists what it holds")
    return names


def choose_bos(options: Options, tokenizer: Tokenizer) -> bool:
    """Whether BOS stands before each text. ValueError where it is asked for and there is none."""
    if options.bos == "yes" and tokenizer.bos_id is None:
        raise ValueError(f"--bos yes: {tokenizer.path} has no BOS; leave it out or say --bos no")
    if options.bos != "auto":
        return options.bos == "yes"
    return options.protocol == "harness" and tokenizer.adds_bos


def choose_limits(options: Options, model: Transformer, world: dist.World) -> Limits:
    """What a forward pass may hold on this device; the same on all ranks, if their devices are the same."""
    if options.batch_size:
        return Limits(options.batch_size, sys.maxsize, sys.maxsize)
    config, weight = model.config, model.model.embed_tokens.weight
    tokens = options.batch_tokens or min(
        BATCH_TOKENS[world.device.type], max(LOGITS_BYTES // (config.vocab_size * weight.itemsize), 1)
    )
    room = CACHE_BYTES_ON_CPU
    if world.device.type == "cuda":
        weights = sum(parameter.nbytes for parameter in set(model.parameters()))
        room = max(torch.cuda.get_device_properties(world.device).total_memory - weights, 0) // 3
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.itemsize
    return Limits(BATCH_QUESTIONS, tokens, room // position)


def list_deviations(options: Options, loaded: dict, run: Run, tokenizer: Tokenizer) -> list[str]:
    """In what this run is another one than the leaderboard's, or than the whole benchmark, a line each."""
    found = []
    if (Path(options.data) / MADE_UP).exists():
        found.append("the questions are made up (solar/standin.py): this shows that everything runs, and nothing else")
    for name, (groups, paths) in loaded.items():
        task, n = TASKS[name], sum(len(group.questions) for group in groups)
        if n != task.published:
            found.append(f"{name}: {n:,} of the {task.published:,} published questions")
        if name == "mmlu" and len(groups) != tasks.MMLU_SUBJECTS:
            found.append(f"mmlu: {len(groups)} of the {tasks.MMLU_SUBJECTS} subjects")
        if paths[-1].name == "fewshot.jsonl":
            found.append(f"{name}: shots from {paths[-1].name}, not from the published training file")
        if cut := run.lost.get(name):
            found.append(f"{name}: {cut:,} prompts were longer than {run.max_length:,} tokens and lost their beginning")
    if tokenizer.bos_id is None:
        found.append("the tokenizer has no BOS: none stands before any text")
    elif run.bos != (options.protocol == "harness" and tokenizer.adds_bos):
        found.append(f"{'with' if run.bos else 'without'} BOS, and the protocol has it otherwise (--bos)")
    if options.protocol == "harness":
        if drawn := [name for name in loaded if TASKS[name].shots and name != "mmlu"]:
            found.append(f"{', '.join(drawn)}: the same shots before every question; the leaderboard drew them anew")
        if run.bos:
            found.append("BOS before every text; the leaderboard had none")
        if "gsm8k" in loaded:
            found.append("gsm8k: answers end where harness 0.4 ends them; the leaderboard cut them at the first colon")
    if "gsm8k" in loaded and options.max_new_tokens != 256:
        found.append(f"gsm8k: answers of up to {options.max_new_tokens} tokens; the harness lets them have 256")
    return found


def run(options: Options) -> None:
    """Measure in the job that torchrun has started, or in one of this process alone."""
    if options.perplexity:
        if options.dtype == "fp16":
            raise ValueError("--dtype fp16: perplexity is measured in bf16 or fp32")
        perplexity.report(
            perplexity.Options(
                files=options.perplexity, model=options.model, plan=[options.plan] * bool(options.plan),
                bos=options.bos, device=options.device, dtype=options.dtype, kernels=options.kernels,
                **({} if options.batch_tokens is None else {"batch_tokens": options.batch_tokens}),
            )
        )  # fmt: skip
        return
    with dist.joined(options.device) as world:
        make(options, world)


def main() -> None:
    description = "Measure a model on the six benchmarks of the Open LLM Leaderboard."
    run(cli.parse(Options, prog="python -m solar.evaluate", description=description))


if __name__ == "__main__":
    cli.run(main)
