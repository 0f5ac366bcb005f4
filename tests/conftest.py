"""Which tests run where: Triton reads TRITON_INTERPRET when a kernel is decorated, so that takes its own process."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

from solar.corpus import Source
from solar.shards import prepare
from tests.byte_tokenizer import Bytes

# `make test` runs pytest twice: once here without the interpreter, once on tests/interpreter with it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["gpu"] if INTERPRETED else ["interpreter"]
collect_ignore_glob = ["test_*.py"] if INTERPRETED else []

# What a script starts with & ignores Ctrl-C, what nohup starts a closed terminal, and so does all that these start in
# turn: then the tests of it would fail.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# On a machine that others use, any example may take seconds.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

COMPILED = pytest.StashKey[list[str]]()  # the table that tests/test_compile.py leaves for the end of the run


def pytest_terminal_summary(terminalreporter, config):
    if lines := config.stash.get(COMPILED, None):
        terminalreporter.section("kernels, compiled ahead of time")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def print_at_the_end(pytestconfig):
    """A list of lines to show below the test results."""
    return pytestconfig.stash.setdefault(COMPILED, [])


@pytest.fixture
def write(tmp_path):
    """write({name: text or bytes}) -> a directory of these files"""

    def write(files, folder="text"):
        for name, content in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / folder

    return write


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.model"
    path.write_text("bytes")
    return Bytes(path)


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    from solar import base  # here, since it imports the kernels, and not every test wants them

    folder = tmp_path_factory.mktemp("pieces")
    lines = Path(base.__file__).read_text().splitlines()
    (folder / "tokenizer.model").write_bytes(base.train_tokenizer(lines, 600))
    return folder


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def root(tmp_path) -> Path:
    """Where a run's checkpoints go."""
    return tmp_path / "checkpoints"


@pytest.fixture
def make(tmp_path, bytes_tokenizer):
    """make(path, holdout) -> the directory of tokens, whose ids are bytes"""

    def make(path, holdout=0.0, limit=None, **options):
        source = Source(str(path), limit=limit)
        return prepare(source, bytes_tokenizer, tmp_path / "cache", holdout, workers=1, **options)

    return make
