"""Which tests run where: Triton reads TRITON_INTERPRET when a kernel is decorated, so that takes its own process."""

import os

import pytest

# `make test` runs pytest twice: once here without the interpreter, once on tests/interpreter with it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["gpu"] if INTERPRETED else ["interpreter"]
collect_ignore_glob = ["test_*.py"] if INTERPRETED else []

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
