"""Flags, exit codes, and directories that appear whole or not at all."""

import argparse
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext as nothing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from solar import cli

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Options:
    model: str = cli.flag(help="required")
    count: int = cli.flag(3, help="a number")
    rate: float | None = cli.flag(None, help="perhaps a number")
    kind: Literal["a", "b"] = cli.flag("a", help="one of two")
    names: list[str] = cli.flag([], help="several")
    dry_run: bool = cli.flag(False, help="a switch")
    room: int = cli.flag(7, help="a size", read=cli.size)


def parse(*argv):
    return cli.parse(Options, list(argv), prog="x", description="d")


def test_flags_come_from_the_dataclass():
    assert parse("--model", "m") == Options("m", 3, None, "a", [], False)
    given = parse("--model", "m", "--count", "5", "--rate", "0.5", "--kind", "b", "--names", "p", "q", "--dry-run")
    assert given == Options("m", 5, 0.5, "b", ["p", "q"], True)
    parse("--model", "m", "--names", "z").names.append("w")
    assert parse("--model", "m").names == []  # the default is not shared


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --model"),
        (["--model"], "argument --model: expected one argument"),
        (["--model", "m", "--count", "x"], "argument --count: invalid int value: 'x'"),
        (["--model", "m", "-q"], "unrecognized arguments: -q"),
        (["--model", "m", "--dryrun", "x"], "unrecognized arguments: --dryrun x (did you mean --dry-run?)"),
        (["--model", "m", "--modle=m"], "unrecognized arguments: --modle=m (did you mean --model?)"),
        (
            ["--model", "m", "--room", "some"],
            "argument --room: 'some' is not a size of at least 1 byte, such as 5GB or 5_000_000_000",
        ),
    ],
)
def test_a_wrong_flag_is_one_line_and_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: {message}; x --help lists the flags\n"


def test_sizes():
    sizes = {"1": 1, "5_000": 5000, "12B": 12, "1kB": 1000, "5GB": 5 * 10**9, "1.5GB": 1_500_000_000, "2GiB": 2 << 30}
    sizes |= {"2G": 2 * 10**9, "3MiB": 3 << 20, "1TB": 10**12, "5000000001": 5_000_000_001}
    assert [parse("--model", "m", "--room", text).room for text in sizes] == list(sizes.values())
    for text in ("", "0", "0.1B", "-1", "5 GB", "5iB", "_5", "5__0", "1e9", "５GB", "GB", "5PB", "9" * 400):
        with pytest.raises(argparse.ArgumentTypeError):
            cli.size(text)


def test_a_list_without_its_name(capsys):
    @dataclass
    class Files:
        files: list[str] = cli.flag(positional=True, help="to read", metavar="FILES")
        out: str = cli.flag(help="to write")

    parse = lambda *argv: cli.parse(Files, list(argv), prog="x", description="d")
    given = parse("a", "b c", "--out", "o")
    assert given == parse("--out", "o", "a", "b c") == Files(["a", "b c"], "o")
    assert cli.command_line(given, "x ") == "x a 'b c' --out o"
    assert cli.command_line(Files([], "o"), "x ") == "x --out o"
    with pytest.raises(SystemExit) as exit_:
        parse("--out", "o")
    assert exit_.value.code == 2
    assert "required: FILES" in capsys.readouterr().err


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    assert all(
        flag in out for flag in ("--model", "--count", "--rate", "--kind", "--names", "--dry-run", "(default: 3)")
    )
    assert "None" not in out


def test_a_command_is_chosen_by_its_name(capsys, monkeypatch):
    @dataclass
    class Number:
        count: int = cli.flag(2, help="how many")

    def double(options):
        """Twice a number.

        More.
        """
        print(options.count * 2)

    commands, lists = {"double": (Number, double)}, "prog COMMAND --help lists the flags of one"
    for argv, out in (
        (["double", "--count", "4"], "8\n"),
        (["double"], "4\n"),
        (["--help"], f"usage: prog COMMAND [FLAGS]; {lists}\nprog double: Twice a number.\n"),
    ):
        monkeypatch.setattr("sys.argv", ["x", *argv])
        cli.run_command("prog", commands)
        assert capsys.readouterr().out == out
    for argv, wrong in (([], ""), (["halve"], "'halve' is no command; ")):
        monkeypatch.setattr("sys.argv", ["x", *argv])
        with pytest.raises(ValueError) as error:
            cli.run_command("prog", commands)
        assert str(error.value) == f"{wrong}give a command: double; {lists}"


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise ValueError('w is 3, expected 4')", 2, "error: w is 3, expected 4\n"),
        ("open('/no/such/file')", 2, "error: /no/such/file: No such file or directory\n"),
        ("raise OSError(28, 'x', 'there')", 2, "error: there: no space left on the disk\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("import warnings; warnings.warn('careful')", 0, "note: careful\n"),
        ("pass", 0, ""),
    ],
)
def test_exit_codes_and_one_line(body, code, message):
    script = f"from solar import cli\ndef main():\n    {body}\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, message)


STREAMS = """
import os, sys
from solar import cli

def main():
    null = os.stat(os.devnull)
    with open(sys.argv[1], "w") as told:
        print([os.path.samestat(os.fstat(number), null) for number in range(3)], told.fileno(), file=told)
    print("out", sys.stdin.read(), flush=True)
    print("err", file=sys.stderr)

cli.run(main)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_nobody_listening(closed, tmp_path):
    told = tmp_path / "told"
    command = ["bash", "-c", f'exec "$0" -c "$1" "$2" {closed}', sys.executable, STREAMS, told]
    done = subprocess.run(command, cwd=ROOT, input="in", capture_output=True, text=True)
    shut = ["<" in closed, " >" in f" {closed}", "2>" in closed]
    assert (done.returncode, told.read_text()) == (0, f"{shut} 3\n")  # no file gets the number of a stream
    assert done.stdout == ("" if shut[1] else f"out {'' if shut[0] else 'in'}\n")
    assert done.stderr == ("" if shut[2] else "err\n")


def test_a_stream_of_another_encoding_shows_what_it_can():
    script = "from solar import cli; cli.run(lambda: print('1 \\xb1 2', '\\udcff'))"
    for encoding, shown in (("ascii", b"1 \\xb1 2 \\udcff\n"), ("utf-8", b"1 \xc2\xb1 2 \xff\n")):
        env = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, shown, b"")


@pytest.mark.parametrize("command", ["-m solar.perplexity", "-m solar.evaluate", "generate.py"])
@pytest.mark.parametrize(("error", "said"), [("KeyboardInterrupt", 1), ("ImportError", 5)])
def test_ctrl_c_during_the_imports_is_one_line(command, error, said, tmp_path):
    for package in ("numpy", "torch"):
        (tmp_path / f"{package}.py").write_text(f"raise {error}")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=env, capture_output=True, text=True)
    if said == 1:
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")
    else:
        assert done.stderr.count("\n") >= said  # another error keeps its traceback


def test_a_bug_keeps_its_traceback():
    script = "from solar import cli\ncli.run(lambda: 1 / 0)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_a_reader_that_leaves_is_no_error():
    script = "from solar import cli\ncli.run(lambda: [print('x' * 1000) for _ in range(10000)])"
    done = subprocess.run(
        f'"{sys.executable}" -c "{script}" | head -1', shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_publish_is_all_or_nothing(tmp_path):
    out = tmp_path / "out"
    with cli.publish(out) as staging:
        (staging / "config.json").write_text("1")
        (staging / "model.safetensors").write_text("")
        assert not out.exists()
    assert (out / "config.json").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]

    def fail(force):
        with cli.publish(out, force) as staging:
            (staging / "config.json").write_text("2")
            raise OSError("disk")

    with pytest.raises(FileExistsError, match="--force"):
        fail(force=False)
    with pytest.raises(OSError, match="disk"):
        fail(force=True)
    assert (out / "config.json").read_text() == "1"
    with cli.publish(out, force=True) as staging:
        (staging / "config.json").write_text("3")
    assert (out / "config.json").read_text() == "3"
    assert os.listdir(tmp_path) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~cli.umask()


def test_force_replaces_model_directories_only(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years")
    for innocent in (
        "thesis.txt",
        "config.json",
        "model.safetensors",
        "src",
    ):  # together they are a project, not a model
        (home / innocent).mkdir() if innocent == "src" else (home / innocent).write_text("years")
        with pytest.raises(FileExistsError, match="not just a model") if innocent != "model.safetensors" else nothing():
            cli.check_output(home, force=True)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "train-00000.bin").write_text("")
    with pytest.raises(FileExistsError, match="token shards"):
        cli.check_output(shards, force=True)
    (shards / "train.offsets").write_text("")
    cli.check_output(shards, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="not a directory"), cli.publish(tmp_path / "file", force=True):
        raise AssertionError("not reached")
    assert (home / "thesis.txt").read_text() == "years"


def test_a_failed_swap_puts_the_old_one_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "model.safetensors").write_text("")
    monkeypatch.setattr(cli, "_exchange", lambda *_: cli.os.rmdir("/no/such"))  # as on a filesystem that cannot
    rename = Path.rename

    def fail_into_place(self, target):
        if Path(target) == out and ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(OSError, match="Input/output"), cli.publish(out, force=True) as staging:
        (staging / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "old"


def test_what_a_killed_run_leaves_is_removed_by_the_next_but_a_living_one_is_not(tmp_path):
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from solar import cli
        with cli.publish(Path({str(tmp_path / "out")!r})) as staging:
            (staging / "big").write_text("x")
            print("ready", flush=True)
            time.sleep(60)
    """)
    start = lambda: subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    killed, living = start(), start()
    assert killed.stdout.readline() == living.stdout.readline() == "ready\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    try:
        assert len(os.listdir(tmp_path)) == 2
        with cli.publish(tmp_path / "out") as staging:
            (staging / "config.json").write_text("1")
        left = sorted(os.listdir(tmp_path))
        assert len(left) == 2
        assert left[0].startswith(".out.partial-")
        assert left[1] == "out"
    finally:
        living.kill()
        living.wait()


STOPPED = {signal.SIGTERM: "terminated\n", signal.SIGHUP: "hangup\n", signal.SIGINT: "interrupted\n"}


@pytest.mark.parametrize("number", STOPPED)
def test_a_run_that_is_stopped_cleans_up(tmp_path, number):
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from solar import cli
        def main():
            with cli.publish(Path({str(tmp_path / "out")!r})):
                print("ready", flush=True)
                time.sleep(60)
        cli.run(main)
    """)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate()[1] == STOPPED[number]
    assert process.returncode == 128 + number
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interruption_is_asked_for_even_where_nobody_reads(number):
    script = textwrap.dedent(f"""
        import os, sys
        from solar import cli
        stop = cli.Interruption()
        os.close(2)
        os.kill(os.getpid(), {int(number)})
        print(stop())
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "True\n"


def test_lines_that_nobody_hears_stop_nothing():
    def refused(*_, **__):
        raise BrokenPipeError

    cli.unheard(refused)("step 1", flush=True)


def test_under_nohup_a_run_outlives_its_terminal():
    script = textwrap.dedent("""
        import os, signal
        from solar import cli
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
        cli.run(lambda: (os.kill(os.getpid(), signal.SIGHUP), print("alive")))
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n")


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("raise ValueError('no')", 2, "\nerror: no\n"),
        ("raise KeyboardInterrupt", 130, "\ninterrupted\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "\nterminated\n"),
        ("progress.close(); raise ValueError('no')", 2, "\nerror: no\n"),
        ("os.close(2); os.kill(os.getpid(), signal.SIGHUP)", 129, ""),  # with its terminal
    ],
)
def test_the_last_line_is_one_of_its_own(end, code, message):
    """Also behind a progress line, which on a terminal has no end."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        from solar import cli
        sys.stderr.isatty = lambda: True
        def main():
            progress = cli.Progress("writing", 100)
            progress.shown = 0
            progress.advance(50)
            {end}
        cli.run(main)
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    shown = done.stderr.decode()
    assert done.returncode == code
    assert shown.startswith("\rwriting  50%")
    assert shown.rstrip(" ").endswith(message)
    assert shown.count("\n") == message.count("\n")


def test_files_that_killed_runs_left_are_removed(tmp_path):
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from solar import cli
        with cli.publish_file(Path({str(tmp_path / "out.jsonl")!r})) as file:
            file.write("half")
            print("ready", flush=True)
            time.sleep(60)
    """)
    start = lambda: subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    killed, living = start(), start()
    assert killed.stdout.readline() == living.stdout.readline() == "ready\n"
    killed.kill()
    killed.wait()
    try:
        assert len(os.listdir(tmp_path)) == 2
        with cli.publish_file(tmp_path / "out.jsonl") as file:
            file.write("whole")
        left = sorted(os.listdir(tmp_path))
        assert len(left) == 2
        assert left[0].startswith(".out.jsonl.partial-")
        assert (tmp_path / "out.jsonl").read_text() == "whole"
    finally:
        living.kill()
        living.wait()


def test_a_write_that_fails_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for publish in (cli.publish, cli.publish_file):
            with pytest.raises(OSError) as failure, publish(tmp_path / "out"):
                pass
            assert cli.describe(failure.value) == f"{tmp_path}/out: no space left on the disk"
    assert os.listdir(tmp_path) == []
    copying = OSError(28, "No space left on device", "source", None, "target")
    assert cli.describe(copying) == "target: no space left on the disk"
    assert cli.describe(OSError(2, "No such file", "source", None, "target")) == "source: No such file"


def test_progress_in_a_log_is_plain_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = cli.Progress("writing", 1000)
    for _ in range(10):
        now[0] += 6.0
        progress.advance(100)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "writing  20%  200 B of 1.00 kB  17 B/s  48 s left"
    assert lines[-1] == "writing 100%  1.00 kB of 1.00 kB  17 B/s  0 s left"
    assert not any("\r" in line for line in lines)


def test_units():
    assert [cli.human_bytes(n) for n in (0, 999, 1000, 21_463_056_384)] == ["0 B", "999 B", "1.00 kB", "21.46 GB"]
    assert [cli.human_seconds(s) for s in (0.4, 59, 61, 3661)] == ["0 s", "59 s", "1 min 01 s", "1 h 01 min"]


FREED = """
import resource
import sys
import torch

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def of_a_step():
    before = faults()
    for _ in range(5):
        torch.ones(4_000_000), torch.ones(9_000_000)  # 16 and 36 MB, freed at once
    return faults() - before


before = of_a_step()
exec(sys.argv[1])
of_a_step()
print(before, of_a_step())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what is asked of glibc")
@pytest.mark.parametrize(
    "command",
    [
        "from solar import dist; dist.setup('cpu')",
        "import generate; generate.load(generate.Options(model='solar/assets/base'))",
    ],
)
def test_what_a_step_has_freed_is_there_for_the_next(command):
    done = subprocess.run([sys.executable, "-c", FREED, command], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    if before < 5 * 8_000:  # another C library, or a kernel with huge pages: nothing to gain
        pytest.skip(f"only {before} page faults without it")
    assert after < 1_000, f"{before} page faults before, {after} after"
