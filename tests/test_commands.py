"""What a user types, end to end on a tiny model: make, generate.py, and every command that the README prints."""

import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import generate
import train
from solar import analyze, base, cli, evaluate, mathdata, merge, perplexity, plan, reference, upscale
from tests.bench import compare
from tests.bench import upscale as bench_upscale
from tests.training import signals_kept

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the tree in which a bare `make upscale` has run."""
    tree = tmp_path_factory.mktemp("clone") / "solar"
    tree.mkdir()
    for name in ("solar", "kernels", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    for name in ("generate.py", "train.py", "Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tree)
    done = shell(tree, "make upscale")
    assert done.returncode == 0, done.stderr
    return tree, done


def shell(tree: Path, command: str, stdin: str = "") -> subprocess.CompletedProcess:
    """Run a line as a user whose environment is active would."""
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    env |= {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", command], cwd=tree, env=env, input=stdin, capture_output=True, text=True)


@pytest.fixture
def typed(checkout, monkeypatch, capsys):
    """typed(flags) of generate.py in the checkout -> (exit code, stdout, stderr): what `shell` gives, without the
    seconds that torch takes to be imported."""
    monkeypatch.chdir(checkout[0])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # cli.run takes it for itself

    def run(flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *shlex.split(flags)])
        with signals_kept(), pytest.raises(SystemExit) as ended:
            cli.run(generate.main)
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


def test_bare_make_upscale_says_what_it_did_and_what_to_type_next(checkout):
    tree, done = checkout
    assert "dus: 12 -> 18 layers" in done.stdout
    base_tokenizer = tree / "solar/assets/base/tokenizer.model"
    assert base_tokenizer.read_bytes() == (tree / "out/solar/tokenizer.model").read_bytes()
    typed_next = re.search(r"python generate\.py .*", done.stdout.splitlines()[-2]).group()
    assert done.stdout.splitlines()[-1].endswith("torchrun train.py")
    again = shell(tree, typed_next + " --max-new-tokens 4")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("A shop has 12 shells")


def test_a_dry_run_does_not_say_to_try_what_is_not_there(checkout):
    done = shell(checkout[0], "make upscale OUT=out/none ARGS='--dry-run --model-type keep'")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "dry run: nothing written")


def test_make_upscale_twice_does_not_overwrite(checkout):
    tree, _ = checkout
    again = shell(tree, "make upscale")
    assert again.returncode == 2
    assert "error: out/solar exists already" in again.stderr
    assert "Traceback" not in again.stderr
    assert shell(tree, "make upscale PLAN=dus:3 ARGS=--force").returncode == 0


def test_make_without_a_target_explains(checkout):
    tree, _ = checkout
    out = shell(tree, "make").stdout
    assert all(word in out for word in ("upscale", "test", "MODEL=", "OUT=", "PLAN=", "NPROC=", "PYTHON="))


def test_make_in_an_environment_without_the_packages_says_what_to_install(checkout, tmp_path):
    tree, _ = checkout
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    done = shell(tree, f"make upscale PYTHON={tmp_path}/empty/bin/python")
    assert done.returncode == 2
    assert re.search(r"error: .*empty/bin/python lacks torch, .*-m pip install -r requirements\.txt", done.stderr)


def test_generate_streams_text_and_prints_figures(checkout):
    tree, _ = checkout
    done = shell(tree, 'python generate.py --prompt "def main():" --max-new-tokens 5')
    assert done.returncode == 0
    assert done.stdout.startswith("def main():")
    figures = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"prompt \d+ tokens, new 5 tokens, first token [\d.]+ s, [\d.]+ tokens/s, [\d.]+ GB/s of weights read", figures
    )


def test_generate_is_reproducible_and_plan_equals_the_written_model(checkout, typed):
    line = '--prompt "import os" --max-new-tokens 8 --no-echo --temperature 1 --seed 3 --dtype float32'
    written = shell(checkout[0], f"python generate.py {line}").stdout
    again, planned = (typed(line + more)[1] for more in ("", " --model solar/assets/base --plan dus"))
    assert written == again == planned != ""
    assert typed(line.replace("--seed 3", "--seed 4"))[1] != written


def test_generate_reads_standard_input_and_files(checkout, typed):
    tree, _ = checkout
    piped = shell(tree, "python generate.py --max-new-tokens 4", stdin="class A:\n    def f\n")
    assert piped.stdout.startswith("class A:\n    def f")
    (tree / "prompts.txt").write_text("import\nclass Something:\n\nx\n")
    batch = typed("--prompts prompts.txt --max-new-tokens 4 --dtype float32")
    alone = [
        typed(f'--prompt "{text}" --max-new-tokens 4 --dtype float32')[1]
        for text in ("import", "class Something:", "x")
    ]
    between = "\n" if any("\n" in text.removesuffix("\n") for text in alone) else ""
    assert batch[:2] == (0, between.join(alone))
    (tree / "prompts.txt").write_text("\ufeffimport\n \t\nx\n")  # a byte order mark, and a line of nothing
    told = typed("--prompts prompts.txt --max-new-tokens 1")[1]
    assert [line[:1] for line in told.split("\n") if line] == ["i", "x"]


def test_several_results_are_told_apart_where_they_are_of_several_lines(capsys, monkeypatch):
    for new, shown in ((["1", "2"], "a1\nb2\n"), (["1\n", "2\n3"], "a1\n\n\nb2\n3\n")):
        session = SimpleNamespace(
            options=generate.Options(),
            tokenizer=SimpleNamespace(encode=lambda text, bos: [1], adds_bos=False, bos_id=None, eos_id=None),
            model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4)),
            run=lambda _, emit, new=new: [emit(*pair) for pair in enumerate(new)] and "",
        )
        generate.complete(session, {"one": "a", "other": "b"})
        assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("flags", "piped", "shown"),
    [
        (["--prompt", "é"], b"", [{"the prompt": "é"}, []]),
        (["--stop", "é"], "é\n".encode(), [{"the prompt": "é"}, ["é"]]),
        (["--chat", "--prompt", "é"], b"", ["é", []]),
        ([], b"a\xff\xfe", "standard input is not UTF-8: byte 0xff at position 1; convert it"),
        (["--prompt", b"\xff"], b"", "the prompt is not UTF-8: byte 0xff at position 0"),
        (["--chat", "--prompt", "x", "--system", b"\xff"], b"", "--system is not UTF-8: byte 0xff"),
    ],
)
@pytest.mark.parametrize("locale", ["ascii", "utf-8"])
def test_bytes_are_utf8_whatever_the_locale_makes_of_them(flags, piped, shown, locale, monkeypatch):
    """As Python hands over what is typed and what is piped: with an escape for each byte that the locale lacks."""
    heard = []
    typed = [(flag if isinstance(flag, bytes) else flag.encode()).decode(locale, "surrogateescape") for flag in flags]
    monkeypatch.setattr(sys, "argv", ["generate.py", *typed])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), locale))
    monkeypatch.setattr(generate, "load", lambda options: options)
    for does in ("complete", "chat"):
        monkeypatch.setattr(generate, does, lambda options, texts: heard.extend([texts, options.stop]))
    with pytest.raises(ValueError, match=shown) if isinstance(shown, str) else contextlib.nullcontext():
        generate.main()
    assert heard == ([] if isinstance(shown, str) else shown)


def test_chat_answers_line_by_line(checkout):
    tree, _ = checkout
    done = shell(tree, "python generate.py --chat --max-new-tokens 3", stdin="Hello\n\nAnd you?\n")
    assert done.returncode == 0
    figures = done.stderr.splitlines()
    assert len(figures) == 2
    first, second = (int(re.match(r"prompt (\d+) tokens", line).group(1)) for line in figures)
    assert second > first + 5  # the second turn carries the first


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--model nowhere --prompt x", "nowhere"),
        ("--prompt x --device nonsense", "--device nonsense"),
        ("--prompt x --dtype int8", "int8"),
        ("--prompt x --plan dus:99", "M = 99 does not fit a model of 18 layers"),
        ("--prompt x --temperature 1 --top-p 2", "top_p must be above 0"),
        ("--prompt x --max-new-tokens 0", "max_new_tokens must be at least 1"),
        ("--prompts nowhere.txt", "nowhere.txt: No such file"),
        ("--prompt x --prompts y", "not both"),
        ("--chat --template solar --prompts y", "--chat takes"),
        (
            "--prompts long.txt",
            "long.txt, line 3 has 1202 tokens; with 1 new one it exceeds the model's context of 1024",
        ),
        (f"--prompt '{'x ' * 1200}'", "the prompt has 1202 tokens"),
        (f"--chat --prompt '{'x ' * 1200}'", "the message, with what the template adds, has 12"),
    ],
)
def test_bad_input_is_one_line_and_code_2(typed, flags, says):
    Path("long.txt").write_text("import\n\n" + "x " * 1200)  # the directory is the checkout
    code, _, said = typed(flags)
    assert code == 2
    assert says in said
    assert len(said.splitlines()) == 1


def test_flags_of_a_chat_without_one_are_noted(typed):
    code, _, said = typed("--prompt x --max-new-tokens 1 --system 'Be brief.'")
    assert (code, said.splitlines()[0]) == (0, "note: --system and --template do nothing without --chat")


def test_before_make_upscale_generate_says_what_to_do(tmp_path):
    for name in ("solar", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "generate.py", tmp_path)
    done = shell(tmp_path, "python generate.py --prompt x")
    assert done.returncode == 2
    assert "`make upscale` makes it" in done.stderr


# ------------------------------------------------------------------------------------------------ stop texts


def test_stop_texts_are_never_printed_not_even_in_part():
    gate = generate.StopAt(["###", "\n\nUser"])
    assert [gate.push(text) for text in ("a#", "#b", "c\n", "\nUs", "e", "##")] == ["a", "##b", "c", "", "", "\n\nUse"]
    assert gate.push("#!") == ""
    assert gate.met
    gate = generate.StopAt(["END"])
    assert gate.push("xEN") + gate.push("", last=True) == "xEN"
    assert generate.StopAt(["aab"]).push("caaab") == "ca"
    assert generate.StopAt([]).push("anything") == "anything"


# ------------------------------------------------------------------------------------------------ the README


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_commands_of_the_readme_run_as_they_stand(checkout):
    tree, _ = checkout
    first = blocks("sh")[0].splitlines()
    assert [line.split("#")[0].split() for line in first[:2]] == [["make", "upscale"], ["source", ".venv/bin/activate"]]
    done = shell(tree, first[2])
    assert done.returncode == 0, done.stderr
    assert first[3].startswith("torchrun train.py ")
    trained = shell(tree, "torchrun train.py --max-steps 2 --eval-sequences 2 --data problems:1:2000")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-1] == "out/pretrain/model"
    done = shell(tree, first[4])
    assert done.returncode == 0, done.stderr
    drawn = shell(tree, "python -m solar.analyze curves out/pretrain")
    assert "step 1" in drawn.stdout, drawn.stderr


def test_every_flag_and_plan_in_the_readme_exists():
    """Each command is held against the options of its program; each plan is parsed for Mistral-7B's 32 layers."""
    programs = {
        "generate.py": generate.Options,
        "train.py": train.Options,
        "solar.analyze layers": analyze.LayersOptions,
        "solar.analyze seams": analyze.SeamsOptions,
        "solar.analyze search": analyze.SearchOptions,
        "solar.analyze curves": analyze.CurvesOptions,
        "solar.base examine": base.ExamineOptions,
        "solar.mathdata problems": mathdata.ProblemsOptions,
        "solar.mathdata rephrase": mathdata.RephraseOptions,
        "solar.mathdata pairs": mathdata.PairsOptions,
        "solar.mathdata decontaminate": mathdata.DecontaminateOptions,
        "solar.evaluate": evaluate.Options,
        "solar.merge": merge.Options,
        "solar.perplexity": perplexity.Options,
        "solar.reference": reference.Options,
        "solar.upscale": upscale.Options,
        "tests.bench.compare": compare.Options,
        "tests.bench.upscale": bench_upscale.Options,
    }
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    commands = lines + re.findall(r"`((?:python|torchrun) [^`]*)`", README)
    seen = set()
    for command in commands:
        for program, options in programs.items():
            if program in command:
                seen.add(program)
                known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(options)}
                own = command.partition(program)[2]  # what stands before is torchrun's
                assert set(re.findall(r"(?<=\s)--[a-z-]+", own)) <= known, command
        for text in re.findall(r"(?:PLAN=|--plan )([^\s`#]+)", command):
            plan.parse_plan(text, 32)
    assert seen >= {"train.py", "generate.py", "solar.upscale", "solar.evaluate", "solar.perplexity"}
    table = re.findall(r"^\| `([a-z]+[:\d,-]*)` \|", README, flags=re.MULTILINE)
    assert len(table) >= 6
    for text in table:
        plan.parse_plan(text, 32)


def test_the_readme_names_what_exists():
    for name in re.findall(r"`((?:solar|kernels|tests)/[\w/]+\.py)(?::[\w.]+)?`", README):
        assert (ROOT / name).is_file(), name
    for name, attribute in re.findall(r"`((?:solar|kernels)/[\w/]+\.py):([\w.]+)`", README):
        source = (ROOT / name).read_text()
        assert re.search(rf"(def|class) {attribute.split('.')[-1]}\b", source), f"{name}:{attribute}"
    tree = re.search(r"```\n(train\.py .*?)```", README, flags=re.DOTALL).group(1)
    listed = {line.split()[0] for line in tree.splitlines()}
    there = {f"solar/{path.name}" for path in (ROOT / "solar").glob("*.py")} - {"solar/__init__.py"}
    there |= {"train.py", "generate.py", "solar/assets/base/"}
    assert there | {"kernels/", "tests/", "tests/interpreter/", "tests/bench/", "tests/reports/"} == listed
    lines = len((ROOT / "solar/model.py").read_text().splitlines())
    assert lines < 300, "which README says"
    for target in re.findall(r"`?make ([a-z-]+)\b", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target


def test_the_library_example_of_the_readme_runs(tmp_path):
    code = (
        blocks("python")[0]
        .replace("mistral-7b", str(ROOT / "solar/assets/base"))
        .replace('device="cuda"', 'device="cpu"')
    )
    code = code.replace('"grown"', repr(str(tmp_path / "saved"))).replace("dus:8", "dus:3").replace("5565", "565")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "saved/model.safetensors").is_file()
    assert (tmp_path / "saved/tokenizer.model").is_file()


def test_our_own_environment_is_kept_complete_even_when_it_is_active(checkout):
    """After `source .venv/bin/activate`, `make test` still installs what the tests need."""
    tree, _ = checkout
    plan = subprocess.run(
        ["make", "-n", "test"],
        cwd=tree,
        env=os.environ | {"VIRTUAL_ENV": f"{tree}/.venv"},
        capture_output=True,
        text=True,
    ).stdout
    assert "pip install" in plan
    assert "requirements-dev.txt" in plan
