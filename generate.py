"""Text from a model: `python generate.py --prompt "The meaning of life is"`.

Continues a prompt (an argument, standard input, or a file of prompts as one batch), or chats with an instruction-tuned
model. `--plan dus:8` tries an up-scaling on the base's own weights, without writing it.
"""

import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import solar

if __name__ == "__main__":
    solar.interruptible()

import torch

from kernels import CHOICES, select
from solar import cli
from solar.checkpoint import choose_device, load_model
from solar.directory import CheckpointReader
from solar.model import Transformer
from solar.plan import GRAMMAR
from solar.sampling import Memory, generate
from solar.tokenizer import TEMPLATES, StreamDecoder, Tokenizer, encode_prompt, end_ids


@dataclass
class Options:
    prompt: str | None = cli.flag(None, help="text to continue (default: standard input)", metavar="TEXT")
    prompts: str | None = cli.flag(None, help="file with a prompt on each line, continued as one batch", metavar="FILE")
    chat: bool = cli.flag(False, help="put the prompt into a chat template; without a prompt, a conversation")
    template: Literal[*TEMPLATES] = cli.flag("solar", help="the template of --chat")
    system: str = cli.flag("", help="system message of --chat", metavar="TEXT")
    model: str = cli.flag("out/solar", help="model directory", metavar="DIR")
    plan: str | None = cli.flag(None, help=f"up-scale while loading, layers sharing memory: {GRAMMAR}")
    device: str = cli.flag("auto", help="cpu, cuda, cuda:1, mps; auto: cuda where there is one")
    dtype: str | None = cli.flag(None, help="bfloat16, float16 or float32 (default: as stored)")
    max_new_tokens: int = cli.flag(128, help="stop after so many tokens", metavar="N")
    temperature: float = cli.flag(0.0, help="0 takes the likeliest token", metavar="X")
    top_k: int | None = cli.flag(None, help="draw among the K likeliest tokens", metavar="K")
    top_p: float | None = cli.flag(None, help="draw among the likeliest tokens that reach P together", metavar="P")
    min_p: float | None = cli.flag(
        None, help="draw among tokens at least P times as likely as the likeliest", metavar="P"
    )
    repetition_penalty: float = cli.flag(1.0, help="above 1 makes tokens that stand already less likely", metavar="X")
    stop: list[str] = cli.flag([], help="end at any of these texts, which are not printed", metavar="TEXT")
    seed: int | None = cli.flag(None, help="for the same draw every time")
    no_echo: bool = cli.flag(False, help="print only what is new, without the prompt before it")
    kernels: Literal[CHOICES] = cli.flag("auto", help="which form of the kernels runs")


class StopAt:
    """Lets text through up to the first of some stop texts, and keeps back what may be the beginning of one."""

    def __init__(self, stops: list[str]):
        self.stops, self.held, self.met = [stop for stop in stops if stop], "", False

    def push(self, text: str, last: bool = False) -> str:
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.met = True
            return self.held[: min(found)]
        keep = 0 if last else max((_overlap(self.held, stop) for stop in self.stops), default=0)
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return ready


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Session:
    """A loaded model with its tokenizer, and the settings of this run."""

    options: Options
    model: Transformer
    tokenizer: Tokenizer
    eos: set[int] = field(default_factory=set)
    memory: Memory = field(default_factory=Memory)

    def run(self, prompts: list[list[int]], emit: Callable[[int, str], None]) -> str:
        """Continue prompts; emit(row, text) receives the text of each as it is made. Returns the line of figures."""
        options = self.options
        room = self.model.config.max_position_embeddings - max(map(len, prompts), default=0)
        max_new_tokens = min(options.max_new_tokens, max(room, 1))
        if 0 < room < options.max_new_tokens:
            context = self.model.config.max_position_embeddings
            print(f"note: room for {room} new tokens in the context of {context}", file=sys.stderr)
        decoders = [StreamDecoder(self.tokenizer, prompt) for prompt in prompts]
        gates = [StopAt(options.stop) for _ in prompts]
        times: list[float] = []

        def on_token(row: int, token: int) -> bool:
            times.append(time.perf_counter())
            if text := gates[row].push(decoders[row].push(token)):
                emit(row, text)
            return gates[row].met

        start = time.perf_counter()
        new = generate(
            self.model,
            prompts,
            max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            eos_id=sorted(self.eos),
            seed=options.seed,
            on_token=on_token,
            memory=self.memory if len(prompts) == 1 else None,
        )
        for row, (decoder, gate) in enumerate(zip(decoders, gates, strict=True)):
            if not gate.met and (text := gate.push(decoder.flush(), last=True)):
                emit(row, text)
        figures = [f"prompt {sum(map(len, prompts))} tokens", f"new {sum(map(len, new))} tokens"]
        if times:
            figures.append(f"first token {times[0] - start:.2f} s")
        steps = max(map(len, new)) - 1
        if steps > 0 and (seconds := times[-1] - times[0]) > 0:
            figures.append(f"{(len(times) - sum(map(bool, new))) / seconds:.1f} tokens/s")
            figures.append(f"{steps * weight_bytes(self.model) / seconds / 1e9:.1f} GB/s of weights read")
        return ", ".join(figures)


def print_figures(figures: str) -> None:
    sys.stdout.flush()  # so that a terminal shows them last
    print(figures, file=sys.stderr)


def weight_bytes(model: Transformer) -> int:
    """Bytes of weights that one decoding step reads: every layer as often as it stands in the plan, and the head."""
    parts = [
        *model.model.layers,
        model.model.norm,
        model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens,
    ]
    return sum(parameter.nbytes for part in parts for parameter in part.parameters())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _as_utf8(given: str, what: str) -> str:
    """What was typed or piped, whose bytes are UTF-8 whatever the locale made of them. ValueError if they are not."""
    try:
        return given.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise ValueError(f"{what} is not UTF-8: {wrong}; convert it, as `iconv -f LATIN1 -t UTF-8` does") from None


def load(options: Options) -> Session:
    if options.model == Options.model and not Path(options.model).exists():
        raise FileNotFoundError(f"{options.model} does not exist yet: `make upscale` makes it, or give --model DIR")
    device = choose_device(options.device)
    if options.temperature == 0 and any(
        x is not None for x in (options.top_k, options.top_p, options.min_p, options.seed)
    ):
        print("note: temperature 0 takes the likeliest token; top-k, top-p, min-p and seed do nothing", file=sys.stderr)
    if not options.chat and (options.system or options.template != Options.template):
        print("note: --system and --template do nothing without --chat", file=sys.stderr)
    if device.startswith("cpu"):
        cli.keep_freed_memory()
    select(options.kernels)
    CheckpointReader(options.model)  # what is no model is said to be none, before its tokenizer is missed
    tokenizer = Tokenizer(options.model)
    model = load_model(options.model, dtype=options.dtype, device=device, plan=options.plan)
    ends = model.config.eos_token_id
    eos = set(ends) if isinstance(ends, tuple) else {ends}
    eos |= end_ids(tokenizer, options.template if options.chat else None)
    return Session(options, model, tokenizer, eos - {None})


def _check_length(session: Session, prompt: list[int], name: str) -> None:
    context = session.model.config.max_position_embeddings
    if len(prompt) >= context:
        raise ValueError(
            f"{name} has {len(prompt)} tokens; with 1 new one it exceeds the model's context of {context} "
            "(max_position_embeddings): shorten it"
        )


def complete(session: Session, texts: dict[str, str]) -> None:
    """Continue plain texts: one is streamed, several are printed in order when all are done, with an empty line between
    them if any has more than one. texts: by the names that messages give them.
    """
    options, tokenizer = session.options, session.tokenizer
    prompts = [tokenizer.encode(text, bos=tokenizer.adds_bos) for text in texts.values()]
    prompts = [ids or [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None][:1] for ids in prompts]
    for name, prompt in zip(texts, prompts, strict=True):
        _check_length(session, prompt, name)
    if len(texts) == 1:
        echo = [] if options.no_echo else [*texts.values()]  # with the first new text: an error would be glued to it
        figures = session.run(
            prompts, lambda _, text: print(*echo[:1], text, sep="", end="", flush=True) or echo.clear()
        )
        print(*echo)
    else:
        results: list[list[str]] = [[] for _ in texts]
        figures = session.run(prompts, lambda row, text: results[row].append(text))
        whole = [
            ("" if options.no_echo else text) + "".join(new) for text, new in zip(texts.values(), results, strict=True)
        ]
        print(*whole, sep="\n\n" if any("\n" in text for text in whole) else "\n")
    print_figures(figures)


def chat(session: Session, message: str | None) -> None:
    """One answer to `message`, or a conversation: each line of standard input is a turn, until it ends."""
    options = session.options
    messages = [{"role": "system", "content": options.system}] if options.system else []
    talking = message is None
    if talking and sys.stdin.isatty():
        print("Each line is a message; Ctrl-D ends.", file=sys.stderr)
    while True:
        if talking:
            try:
                message = _as_utf8(input("> " if sys.stdin.isatty() else ""), "the message")
            except EOFError:
                return
            if not message.strip():
                continue
        messages.append({"role": "user", "content": message})
        prompt = encode_prompt(session.tokenizer, options.template, messages)
        first = int(messages[0]["role"] == "system")
        while len(prompt) >= session.model.config.max_position_embeddings and len(messages) > first + 1:
            del messages[first : first + 2]
            prompt = encode_prompt(session.tokenizer, options.template, messages)
            print("note: the context is full; the oldest question and answer are forgotten", file=sys.stderr)
        _check_length(session, prompt, "the message, with what the template adds,")
        answer: list[str] = []

        def emit(_: int, text: str, answer=answer) -> None:
            answer.append(text)
            print(text, end="", flush=True)

        figures = session.run([prompt], emit)
        print()
        print_figures(figures)
        if not talking:
            return
        messages.append({"role": "assistant", "content": "".join(answer)})


def main() -> None:
    options = cli.parse(Options, prog="generate.py", description="Continue a text, or chat, with a model.")
    if options.prompt is not None and options.prompts is not None:
        raise ValueError("give --prompt or --prompts, not both")
    if options.chat and options.prompts is not None:
        raise ValueError("--chat takes --prompt or standard input, not --prompts")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    options.system = _as_utf8(options.system, "--system")
    options.stop = [_as_utf8(stop, "--stop") for stop in options.stop]
    texts = {} if options.prompt is None else {"the prompt": _as_utf8(options.prompt, "the prompt")}
    if options.prompts is not None:
        lines = _read_text(Path(options.prompts)).split("\n")
        texts = {f"{options.prompts}, line {number}": line for number, line in enumerate(lines, 1) if line.strip()}
        if not texts:
            raise ValueError(f"{options.prompts}: no prompt in it")
    elif not texts and not options.chat:
        if sys.stdin.isatty():
            print("Reading the prompt from standard input; Ctrl-D ends it.", file=sys.stderr)
        texts = {"the prompt": _as_utf8(sys.stdin.read().removesuffix("\n"), "standard input")}
    try:
        session = load(options)
        if options.chat:
            chat(session, texts.get("the prompt"))
        else:
            complete(session, texts)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        hint = "try --dtype bfloat16, a smaller --max-new-tokens, or --device cpu"
        raise ValueError(f"out of memory: {str(error).splitlines()[0][:200]} ({hint})") from None


if __name__ == "__main__":
    cli.run(main)
