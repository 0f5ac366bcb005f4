"""A thousand model directories from strangers: each is refused in clear lines, soon, in little memory, and nothing
outside it is read or written. tests/hostile/ makes them; tests/fuzz.py looks for more."""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings

import generate
from solar import cli, merge, upscale
from solar.checkpoint import load_model
from solar.config import ModelConfig
from solar.optim import choose_trainable
from solar.tokenizer import Tokenizer
from tests import hostile
from tests.fuzz import check_refusal
from tests.hostile import Case

SECONDS, MEMORY = 1.0, 64_000_000  # of CPU, and of memory beyond the header
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sentencepiece_file(sentencepiece_model) -> bytes:
    return (sentencepiece_model / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def kinds(sentencepiece_file):
    return hostile.kinds(sentencepiece_file, tokenizer_json())


def tokenizer_json() -> dict | None:
    """A small tokenizer of words, spelt as `tokenizers` spells it; None without that package."""
    try:
        import tokenizers
    except ImportError:
        return None
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<unk>": 0, "a": 1, "b": 2}, merges=[], unk_token="<unk>"))
    made.decoder = tokenizers.decoders.ByteLevel()
    return json.loads(made.to_str())


# ------------------------------------------------------------------------------------------------ what is watched

_opened: list[str] | None = None  # what has been opened since, while somebody listens


def _listen(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_listen)
# Python's own files, and what the kernel says of this process.
ALLOWED = ["/proc/", "/sys/", "/dev/null", f"{ROOT}/solar", f"{ROOT}/kernels", sys.prefix, sys.base_prefix]
ALLOWED += [*sysconfig.get_paths().values()]


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """The paths that are opened meanwhile."""
    global _opened
    _opened = heard = []
    try:
        yield heard
    finally:
        _opened = None


def _kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:", 1)[1].split(None, 1)[0])


class Costs:
    """CPU seconds of a block, and by how much the most memory that it had at a time exceeds what there was before."""

    def __enter__(self) -> "Costs":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # from now on, VmHWM is the highest anew
            self.before = _kilobytes("VmRSS")
        except OSError:
            self.before = None
        self.start = time.process_time()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.process_time() - self.start
        self.memory = 0 if self.before is None else (_kilobytes("VmHWM") - self.before) << 10


# ------------------------------------------------------------------------------------------------ running a case


def write(folder: Path, files: dict, beside: Path) -> None:
    folder.mkdir()
    for name, content in files.items():
        if callable(content):
            content(folder / name)
        else:
            (folder / name).write_bytes(
                content.replace(b"{beside}", str(beside).encode()) if "index" in name else content
            )


def command_of(case: Case, place: Path):
    """The program that reads the case, as a function without arguments; what it writes goes to place/out."""
    model, out, sound = place / "model", place / "out", place / "sound"
    arguments = [argument.replace("{beside}", str(place)) for argument in case.arguments]
    match case.command:
        case "upscale":
            argv = ["--model", model, "--out", out, *(arguments or ["--plan", "copy"])]
            return lambda: run(upscale.main, argv)
        case "merge":
            models = [sound, model] if len(case.files) % 2 else [model, sound]
            return lambda: run(merge.main, ["--models", *models, "--out", out, "--method", "average", *arguments])
        case "generate":
            argv = ["--model", model, "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu", *arguments]
            return lambda: run(generate.main, argv)
        case "load":
            return lambda: load_model(model, plan=arguments[1] if arguments else None)
        case "trainable":
            names = ModelConfig.from_hf(hostile.CONFIG).tensor_shapes()
            return lambda: choose_trainable(names, "new", model)
    raise AssertionError(case.command)


def run(main, argv: list) -> None:
    """A command in this process: what it says and its exit code come out as one ValueError."""
    kept = sys.argv, warnings.showwarning, [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    caught = Caught()
    try:
        sys.argv = ["command", *map(str, argv)]
        with contextlib.redirect_stdout(Caught()), contextlib.redirect_stderr(caught), pytest.raises(SystemExit) as end:
            cli.run(main)
    finally:
        sys.argv, warnings.showwarning = kept[:2]
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), kept[2], strict=True):
            signal.signal(number, handler)
    if end.value.code != 0:
        assert end.value.code == 2, caught.text
        said = re.fullmatch(r"(note: [^\n]*\n)*error: (?P<refusal>.*)\n", caught.text, re.DOTALL)
        assert said, caught.text
        raise ValueError(said["refusal"])


class Caught:
    """A stream that keeps what is written to it, and is not a terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def check(case: Case, place: Path, tokenizer: bytes) -> None:
    place.mkdir()
    sound = {} if "tokenizer.json" in case.files else {"tokenizer.model": tokenizer}
    write(place / "model", sound | case.files, place)
    write(place / "sound", hostile.single() | sound, place)
    for name, content in case.extra.items():
        (place / name).write_bytes(content)
    (place / "outside.safetensors").write_bytes(hostile.shard(hostile.entries(hostile.NAMES[:3])))
    (place / "here").mkdir()
    before = sorted(os.listdir(place))
    os.chdir(place / "here")
    act = command_of(case, place)
    refused = None
    with warnings.catch_warnings(), listening() as opened, Costs() as costs:
        warnings.simplefilter("ignore")
        try:
            act()
        except (ValueError, OSError) as error:
            refused = cli.describe(error)
    assert refused is not None, "taken for sound"
    check_refusal(refused, place, case.named)
    assert sorted(os.listdir(place)) == before
    assert os.listdir(place / "here") == []  # no canary
    inside = [*ALLOWED, str(place / "model"), str(place / "sound"), *(str(place / name) for name in case.extra)]
    strange = [path for path in opened if not os.path.abspath(path).startswith(tuple(inside)) and path != str(place)]
    assert not strange, strange
    assert costs.seconds < SECONDS, refused
    assert costs.memory < MEMORY + case.header, f"{costs.memory >> 20} MB: {refused}"


# ------------------------------------------------------------------------------------------------ the tests

NAMES = [*hostile.kinds(b"x", {})]


@pytest.fixture(scope="module", autouse=True)
def warm(sentencepiece_file, tmp_path_factory):
    """Everything imported and compiled that a first call imports; and the models that cases start from are sound."""
    place = tmp_path_factory.mktemp("sound")
    here = os.getcwd()
    try:
        for number, files in enumerate((hostile.single(), hostile.sharded(), hostile.legacy(), hostile.release())):
            for command in ("upscale", "merge", "load", "generate"):
                folder = place / f"{number}{command}"
                folder.mkdir()
                write(folder / "model", files | {"tokenizer.model": sentencepiece_file}, folder)
                write(folder / "sound", files | {"tokenizer.model": sentencepiece_file}, folder)
                command_of(Case({}, (), command), folder)()
        yield
    finally:
        os.chdir(here)


@pytest.mark.parametrize("kind", NAMES)
def test_a_hostile_directory_is_refused(kind, kinds, tmp_path, sentencepiece_file):
    if kind not in kinds:
        pytest.skip("needs the optional package tokenizers")
    strategy, count = kinds[kind]
    ran = 0

    @settings(max_examples=count, suppress_health_check=list(HealthCheck), database=None)
    @given(strategy)
    def each(case: Case) -> None:
        nonlocal ran
        ran += 1
        place = tmp_path / str(ran)
        try:
            check(case, place, sentencepiece_file)
        finally:
            os.chdir(tmp_path)
            shutil.rmtree(place)

    each()
    assert ran >= 20


def test_there_are_a_thousand():
    assert sum(count for _, count in hostile.kinds(b"x", {}).values()) >= 1000
    assert min(count for _, count in hostile.kinds(b"x", {}).values()) >= 20


@pytest.mark.parametrize("call", hostile.CALLS[:8], ids=lambda call: call.function.name)
def test_the_code_in_the_pickles_is_alive(call, tmp_path, monkeypatch):
    """With pickle's own reader every payload makes the canary that the tests above never find."""
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(Exception):
        pickle.loads(hostile.program(call))
    assert (tmp_path / hostile.CANARY).is_dir()


def test_the_links_of_a_hub_cache_are_followed(tmp_path, sentencepiece_file):
    """Files of a model may stand elsewhere: snapshots/REVISION/NAME is a link to ../../blobs/HASH."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    for number, (name, content) in enumerate(hostile.sharded().items()):
        (tmp_path / "blobs" / str(number)).write_bytes(content)
        (tmp_path / "model" / name).symlink_to(Path("..", "blobs", str(number)))
    assert load_model(tmp_path / "model").config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json", "generation_config.json", "LICENSE"])
@pytest.mark.parametrize("special", hostile.SPECIAL, ids=["pipe", "folder", "loop", "dangling", "endless"])
def test_what_is_no_file_beside_the_weights_is_passed_over(name, special, tmp_path, sentencepiece_file):
    sound = hostile.single() | {"tokenizer.model": sentencepiece_file}
    write(tmp_path / "model", sound | {name: special}, tmp_path)
    assert Tokenizer(tmp_path / "model").vocab_size == 600
    upscale.upscale(tmp_path / "model", tmp_path / "out", "copy")
    assert {path.name for path in (tmp_path / "out").iterdir()} == sound.keys() | {"upscale.json"}


def test_files_beside_the_weights_must_fit_the_disk_too(tmp_path, monkeypatch):
    write(tmp_path / "model", hostile.single() | {"LICENSE": b"x" * 5000}, tmp_path)
    nbytes = upscale.prepare(tmp_path / "model", "copy").nbytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=nbytes + 4999))
    with pytest.raises(OSError, match="needs"):
        upscale.upscale(tmp_path / "model", tmp_path / "out", "copy")
    assert os.listdir(tmp_path) == ["model"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=nbytes + 5000))
    upscale.upscale(tmp_path / "model", tmp_path / "out", "copy")
