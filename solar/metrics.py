"""metrics.jsonl: the numbers of a run, one JSON object a line."""

import errno
import json
import math
import os
import sys
import tempfile
from pathlib import Path

from solar import cli


class MetricsLog:
    """Numbers of a run, one JSON object a line, each with its "step", written as they come.

    A run that resumes gives its step: what an interrupted one had logged beyond it is dropped, so that the file of a
    run with interruptions says what that of one without says.
    """

    def __init__(self, path: Path, after_step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] <= after_step] if after_step else []
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}-", delete=False
        ) as file:
            file.writelines(json.dumps(entry) + "\n" for entry in kept)
        os.chmod(file.name, 0o666 & ~cli.umask())
        os.replace(file.name, path)
        self.path, self.failed = path, False

    def write(self, entry: dict) -> None:
        """Append an entry; a number that is infinite or NaN becomes null. A full disk is noted once and survived."""
        line = (json.dumps(_finite(entry)) + "\n").encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                try:
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end)  # half a line would spoil the next one
                    raise
        except OSError as error:
            if not self.failed:
                print(f"note: {self.path}: {cli.describe(error)}; metrics are missing from here on", file=sys.stderr)
            self.failed = True


def _finite(value):
    """A JSON value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict]:
    """The entries of a metrics.jsonl; a last line that a killed run did not finish is left out."""
    entries = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise ValueError(f'{path}, line {number}: not an entry with a "step"')
        entries.append(entry)
    return entries
