"""Seconds and memory of a command: `python -m tests.bench.memory python -m solar.upscale --model DIR --out DIR`.

Anonymous memory is what the command itself holds; pages of mapped files are the kernel's to drop. Linux only.
"""

import subprocess
import sys
import time
from pathlib import Path


def measure(command: list[str], **more) -> tuple[float, int, int]:
    """Seconds, the most kB of anonymous memory, and the exit code of a command; `more` is for subprocess.Popen."""
    start, anonymous = time.monotonic(), 0
    process = subprocess.Popen(command, **more)
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        anonymous = max([anonymous, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))])
        time.sleep(0.02)
    return time.monotonic() - start, anonymous, process.returncode


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.bench.memory COMMAND ...")
    seconds, anonymous, code = measure(sys.argv[1:])
    print(f"{seconds:.1f} s, at most {anonymous / 1000:.0f} MB of anonymous memory", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
