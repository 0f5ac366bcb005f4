"""Which tests run where: Triton reads TRITON_INTERPRET when a kernel is decorated, so that takes its own process."""

import os

# `make test` runs pytest twice: once here without the interpreter, once on tests/interpreter with it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["gpu"] if INTERPRETED else ["interpreter"]
collect_ignore_glob = ["test_*.py"] if INTERPRETED else []

compiled_table: list[str] = []  # lines that tests/test_compile.py leaves for the end of the run


def pytest_terminal_summary(terminalreporter):
    if compiled_table:
        terminalreporter.section("kernels, compiled ahead of time")
        for line in compiled_table:
            terminalreporter.write_line(line)
