"""Results on disk as they come, so that a run which was killed goes on where it was.

    {"format": ..., "model": ..., ...}                 what all results depend on: the header
    {"key": "0f3a...", "result": [-41.25, -60.5]}      one result, under a digest of all that it is of
    ...

The file stands beside the output until that is written. A run with another header begins it anew.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from solar import cli


class Journal:
    """OUT.partial, open for writing.

    results: {key: result}, what an earlier run with this header left, and all that was added. other: what the header
    of an earlier run had otherwise, as text, if its results were thrown away for that. Raises ValueError if another
    process is writing to the same file.
    """

    def __init__(self, out: Path, header: dict):
        self.path, self.results, self.other = out.with_name(f"{out.name}.partial"), {}, ""
        out.parent.mkdir(parents=True, exist_ok=True)
        self._file = cli.open_growing(self.path)
        self._file.seek(0)
        content = self._file.read()
        sound = 0
        # A line without its end does not count, even if it is all there: what is added would go on in it.
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(keepends=True)):
            try:
                row = json.loads(line)
                if number:
                    self.results[row["key"]] = row["result"]
                elif row != header:
                    self.other = _difference(row, header)
                    break
            except (ValueError, TypeError, KeyError, AttributeError):
                break
            sound += len(line)
        self._file.truncate(sound)
        if not sound:
            self._write([header])

    def add(self, results: Iterable[tuple[str, Any]]) -> None:
        """Keep the results of these keys; those that are there already stay as they are."""
        new = {key: result for key, result in results if key not in self.results}
        self.results |= new
        self._write([{"key": key, "result": result} for key, result in new.items()])

    def close(self, done: bool) -> None:
        """Close the file; remove it if the output is written."""
        if done:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _write(self, rows: Iterable[dict]) -> None:
        self._file.writelines((json.dumps(row, allow_nan=False) + "\n").encode() for row in rows)
        self._file.flush()


def _difference(found: Any, wanted: dict) -> str:
    if not isinstance(found, dict):
        return "another format"
    name = next((name for name in wanted if found.get(name) != wanted[name]), "more than this one says")
    return f"{name} {found.get(name)}, now {wanted.get(name)}"
