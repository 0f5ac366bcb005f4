"""What every command shares: flags from a dataclass, errors in one line, progress, directories published whole."""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import glob
import hashlib
import io
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import textwrap
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

# ------------------------------------------------------------------------------------------------ flags


def flag(
    default=dataclasses.MISSING,
    *,
    help: str,
    metavar: str | None = None,
    positional: bool = False,
    read: Callable[[str], typing.Any] | None = None,
    **more,
):
    """A dataclass field that becomes `--name`; `default` missing means that the flag is required.

    positional: a required list that is given without its name, as in `command FILES...`. read: makes the value from
    what is typed, or raises argparse.ArgumentTypeError; without it the field's type does.
    """
    if isinstance(default, list):
        more["default_factory"], default = default.copy, dataclasses.MISSING
    metadata = {"help": help, "metavar": metavar, "positional": positional, "read": read}
    return dataclasses.field(default=default, metadata=metadata, **more)


def size(text: str) -> int:
    """Bytes, from "5GB" (10^9), "5GiB" (2^30) or "5_000_000_000": `read` of a flag."""
    found = re.fullmatch(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?)(?:([kKMGT])(i?))?B?", text)
    unit = (1024 if found[3] else 1000) ** " KMGT".index((found[2] or " ").upper()) if found else 0
    if not found or not 1 <= (count := float(found[1]) * unit) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of at least 1 byte, such as 5GB or 5_000_000_000")
    return round(count)


class _Parser(argparse.ArgumentParser):
    """With one line for a wrong flag, instead of the list of them all."""

    def error(self, message: str) -> typing.NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            near = difflib.get_close_matches(unknown.split()[0].split("=")[0], self._option_string_actions, n=1)
            message += f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")


T = typing.TypeVar("T")


def parse(options: type[T], argv: list[str] | None = None, *, prog: str, description: str) -> T:
    """Fill the dataclass `options` from the command line; exits with code 2 and one line for a wrong flag."""
    parser = _Parser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kwargs = {"help": field.metadata["help"], "dest": field.name}
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if missing:
            kwargs["required"] = True
        else:
            kwargs["default"] = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if missing or kwargs["default"] in (None, "", []) or kwargs["default"] is False:
            kwargs["help"] += "%(default).0s"  # "(default: None)" tells nobody anything
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = next(member for member in kind.__args__ if member is not type(None))
        if kind is bool:
            kwargs["action"] = "store_true"
        else:
            if typing.get_origin(kind) is list:
                kwargs["nargs"], kind = "+", kind.__args__[0]
            if typing.get_origin(kind) is typing.Literal:
                kwargs["choices"], kind = kind.__args__, str
            kwargs["type"] = field.metadata["read"] or kind
            if "choices" not in kwargs:
                kwargs["metavar"] = field.metadata["metavar"] or kind.__name__.upper()
        if field.metadata["positional"]:
            del kwargs["dest"], kwargs["required"]
            parser.add_argument(field.name, **kwargs)
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), **kwargs)
    return options(**vars(parser.parse_args(argv)))


def run_command(prog: str, commands: dict[str, tuple[type, Callable[[typing.Any], None]]]) -> None:
    """Carry out `prog COMMAND ...`. commands: {name: (dataclass of its flags, function that takes one)}.

    The function's docstring is its help; `--help` in place of a command lists them. Raises ValueError for none or an
    unknown one, naming those that there are.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(f"usage: {prog} COMMAND [FLAGS]; {prog} COMMAND --help lists the flags of one")
        for known, (_, do) in commands.items():
            print(f"{prog} {known}: {do.__doc__.partition(chr(10))[0]}")
        return
    if name not in commands:
        wrong = f"{name!r} is no command; " if name else ""
        raise ValueError(f"{wrong}give a command: {', '.join(commands)}; {prog} COMMAND --help lists the flags of one")
    options, do = commands[name]
    do(parse(options, sys.argv[2:], prog=f"{prog} {name}", description=do.__doc__))


def command_line(options, label: str) -> str:
    """The flags that give `options`, also those left as they were, without those that are unset; behind a label."""
    words = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is None or value is False or value == []:
            continue
        if not field.metadata["positional"]:
            words.append("--" + field.name.replace("_", "-"))
        if value is not True:
            words += [shlex.quote(str(item)) for item in (value if isinstance(value, list) else [value])]
    return textwrap.fill(
        " ".join(words), 118, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False
    )


# ------------------------------------------------------------------------------------------------ errors


def run(main: Callable[[], None]) -> typing.NoReturn:
    """Call `main` and exit: 0; 2 with one line for bad input or a failed write; 130 for Ctrl-C, 143 for SIGTERM, 129
    for a closed terminal, 141 where nobody reads on."""
    _open_streams()
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a batch system's stop, a closed terminal: clean up as for Ctrl-C
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, which is to outlive the terminal
            signal.signal(number, _stop_on_signal)
    try:
        main()
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `... | head`: the reader has gone, and that is its right
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        _last_line(f"error: {describe(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        _last_line("interrupted")
        sys.exit(130)
    except _Stopped as stopped:
        _last_line(signal.strsignal(stopped.code - 128).lower())
        raise
    sys.exit(0)


def _open_streams() -> None:
    """Let all three streams be there, and print what they cannot encode in another form instead of failing at the end.

    One that was closed (`<&-`) becomes the null device, under its own number: the next file that is opened would get
    that number, and with it what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115, it stays open; the system gives the lowest free number
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        unicode = sys.stdout.encoding.lower().startswith("utf")
        sys.stdout.reconfigure(errors="surrogateescape" if unicode else "backslashreplace")  # file names; all the rest


class _Stopped(SystemExit):
    """By a signal other than Ctrl-C's; its code is 128 and the signal's number."""


def _stop_on_signal(number: int, _) -> None:
    raise _Stopped(128 + number)


def _last_line(text: str) -> None:
    with contextlib.suppress(OSError):  # of a terminal that has been closed
        print(("\n" if Progress.unfinished else "") + text, file=sys.stderr, flush=True)


class Interruption:
    """Whether to stop after the step: SIGTERM, Ctrl-C or a closed terminal ask for it; a second one ends the process.

    (At once when Python comes to it: not while a rank waits for another in a collective. A signal that is ignored, as
    SIGHUP is under nohup, stays so.)
    """

    def __init__(self):
        self.asked, self.number = False, signal.SIGTERM  # which another rank may have been sent
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._ask)

    def __call__(self) -> bool:
        return self.asked

    def _ask(self, number: int, _frame) -> None:
        # What has started this process may pass on a Ctrl-C that the terminal has sent it already: still the first one.
        if self.asked and time.monotonic() - self.when > 1:
            os._exit(128 + number)
        if not self.asked:
            self.asked, self.number, self.when = True, number, time.monotonic()
            unheard(print)("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)


def unheard(say: Callable[..., None]) -> Callable[..., None]:
    """`say` for work that goes on when nobody reads on, or the disk of the log is full."""

    def said(*args, **settings) -> None:
        with contextlib.suppress(OSError):
            say(*args, **settings)

    return said


def describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left on the disk" if full else error.strerror
        name = (full and error.filename2) or error.filename  # a copy that fails names its source first
        return f"{name}: {reason}" if name else f"{reason}"
    return str(error)


# ------------------------------------------------------------------------------------------------ memory

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next tensors: on a CPU, what a GPU has anyway.

    glibc asks the kernel for each large tensor anew and gives it back afterwards, and the kernel clears all its pages:
    10,000 to 50,000 page faults in a training step of 8M parameters, a tenth of its time. Another C library stays as it
    is.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


# ------------------------------------------------------------------------------------------------ progress


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def human_seconds(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


class Progress:
    """Bytes done, rate and time left on stderr: a line that redraws itself on a terminal, one every 10 s in a log.

    show: how a count is written, where it is not one of bytes.
    """

    unfinished = False  # whether the terminal's cursor stands behind such a line

    def __init__(self, label: str, total: float, show: Callable[[float], str] = human_bytes):
        self.label, self.total, self.done, self.show = label, max(total, 1), 0, show
        self.start = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def advance(self, count: float) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.shown >= (0.1 if self.live else 10.0):
            self.shown = now
            self._show(now)

    def close(self) -> None:
        if self.live or self.shown != self.start:
            self._show(time.monotonic(), end="\n")

    def _show(self, now: float, end: str = "") -> None:
        rate = self.done / max(now - self.start, 1e-9)
        left = human_seconds((self.total - self.done) / rate) if rate else "?"
        line = (
            f"{self.label} {self.done / self.total:4.0%}  {self.show(self.done)} of {self.show(self.total)}"
            f"  {self.show(rate)}/s  {left} left"
        )
        Progress.unfinished = self.live and not end
        print(f"\r{line:<79}" if self.live else line, end=end if self.live else "\n", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ publishing


def check_output(out: Path, force: bool) -> None:
    """Raise FileExistsError if `out` exists and may not be replaced, NotADirectoryError if it cannot come to be.

    `force` replaces models and token shards only.
    """
    _check_above(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise FileExistsError(f"{out} exists and is not a directory; give another output directory")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise FileExistsError(f"{out} exists already: give another output directory, or --force to replace it")
        inside = list(out.iterdir())
        weights = any(path.suffix in (".safetensors", ".bin", ".pth") for path in inside)
        told = any((out / name).is_file() for name in ("config.json", "train.offsets"))
        if not weights or not told or any(path.is_dir() for path in inside):
            raise FileExistsError(
                f"{out} is not just a model (config.json and weights, no folders) or token shards (train.offsets and "
                "shards): --force does not replace it"
            )


def _check_above(out: Path) -> None:
    """Raise NotADirectoryError if `out` would stand below what is no directory: a file, or a link to nothing."""
    there = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    if not there.is_dir():
        what = "a link that leads nowhere" if there.is_symlink() and not there.exists() else "a file"
        raise NotADirectoryError(f"{out}: {there} is {what}, not a directory; give another output")


@contextlib.contextmanager
def publish(out: Path, force: bool = False) -> Iterator[Path]:
    """A fresh directory beside `out` to write into; renamed to `out` when the block ends well, removed otherwise.

    Everything is fsynced before the rename, so that `out` is either absent (or what it was) or whole, whenever the
    power goes. A directory that a killed run left behind is removed by the next one: its lock is no longer held.
    """
    check_output(out, force)
    out = out.absolute()
    above = [folder.parent for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = _staging(out)
    with naming(out), contextlib.ExitStack() as undo:
        for _ in range(2):  # and before it is there: whenever Ctrl-C comes, also while it is removed, nothing stays
            undo.callback(shutil.rmtree, staging, ignore_errors=True)
        # Under the parent's lock no other run sees the staging directory before it is locked.
        with open_directory(out.parent) as parent:
            _clear(out, lock(parent, wait=True))
            check_output(out, force)
            staging.mkdir(mode=0o700)
            lock(undo.enter_context(open_directory(staging)))
        yield staging
        staging.chmod(0o777 & ~umask())
        for path in [*staging.rglob("*"), staging]:
            fsync(path)
        with open_directory(out.parent) as parent:
            lock(parent, wait=True)
            check_output(out, force)  # it may have come into being meanwhile
            _swap(staging, out)
            try:
                for folder in (out.parent, *above):
                    fsync(folder)
            except BaseException:
                _swap(staging, out)  # what fails has changed nothing
                raise


def clear_leftovers(out: Path) -> None:
    """Remove what killed runs that were to write `out` left beside it: it takes room."""
    out = out.absolute()
    if out.parent.is_dir():
        with open_directory(out.parent) as parent:
            _clear(out, lock(parent, wait=True))


def _clear(out: Path, locked: bool) -> None:
    """Without locks (on some NFS) nothing says that a run is dead, and what it was writing stays."""
    aside = _aside(out)
    if aside.exists() and out.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        aside.rename(out)  # killed between the two renames of `_swap`
    for stale in _leftovers(out) if locked else ():
        with contextlib.suppress(OSError), open_directory(stale) as found:
            if lock(found):
                shutil.rmtree(stale)


def _staging(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial-{secrets.token_hex(8)}")


def _leftovers(out: Path) -> Iterator[Path]:
    return out.parent.glob(glob.escape(f".{out.name}.partial-") + "*")


def _swap(staging: Path, out: Path) -> None:
    """What stands at these two names changes places; one of them may be nothing.

    In one step where the system can, so that there is something at `out` at every moment. Otherwise what is there
    steps aside first: a failure puts it back, and after a kill in between the next run does.
    """
    if not out.exists():
        staging.rename(out)
    elif not staging.exists():
        out.rename(staging)
    else:
        with contextlib.suppress(OSError):
            return _exchange(staging, out)
        aside = _aside(out)
        try:
            out.rename(aside)
            staging.rename(out)
        finally:
            if aside.exists():
                aside.rename(staging if out.exists() else out)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _exchange(one: Path, other: Path) -> None:
    """Linux's renameat2 with RENAME_EXCHANGE, which Python does not have. OSError where the system has none either."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    if rename is None or rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange):
        number = errno.ENOSYS if rename is None else ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError that names no file, as those of write() and fsync(), name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def check_output_file(out: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise FileExistsError for a file that may not be replaced, NotADirectoryError for one that cannot come to be,
    ValueError for one that is read too."""
    _check_above(out)
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise ValueError(f"{out} is read and cannot be written too; give another --out")
    if out.exists() and (not force or not out.is_file()):
        raise FileExistsError(f"{out} exists already: give another --out, or --force to replace a file")


@contextlib.contextmanager
def publish_file(out: Path) -> Iterator[typing.TextIO]:
    """A file to write to, which is at `out` when the block has ended well, and on the disk; otherwise nothing is."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = _staging(out)
    with naming(out), contextlib.ExitStack() as undo:
        undo.callback(staging.unlink, missing_ok=True)
        with open_directory(out.parent) as parent:
            for stale in _leftovers(out) if lock(parent, wait=True) else ():
                with contextlib.suppress(OSError), open(stale) as found:
                    if lock(found.fileno()):
                        stale.unlink()
            file = undo.enter_context(open(staging, "w", encoding="utf-8"))
            lock(file.fileno())
        yield file
        file.close()
        fsync(staging)
        staging.replace(out)
        fsync(out.parent)


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """A descriptor of a directory: to lock it, or to flush what it lists."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lock(descriptor: int, wait: bool = False) -> bool:
    """Lock a directory until it is closed or this process dies; False if another holds it, or if nobody can."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def open_growing(path: Path) -> BinaryIO:
    """A file that is added to as results come, and that no other process may add to meanwhile: ValueError if one does.

    On a filesystem without locks nobody can tell, and the file is opened all the same.
    """
    file = open(path, "a+b")  # noqa: SIM115, it outlives this function
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path} is being written by another process; wait for it") from None
    except OSError:
        pass
    return file


def is_busy(descriptor: int) -> bool:
    """Lock a file, or say that another process has it (True). Where nobody can lock, it counts as free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def fsync(path: Path) -> None:
    """Return once a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
