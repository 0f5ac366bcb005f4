"""The structure that the README promises: which module imports which, which packages, one forward pass in one file."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module imports strictly lower layers. L0 also holds kernels/.
LAYERS = {
    -2: ["jsonfile"],
    -1: ["tensorfile"],
    0: [
        "config", "plan", "cli", "tokenizer", "archive", "losses", "optim", "problems", "permutation", "tally",
        "chats", "rows", "intervals",
    ],
    1: [
        "model", "meter", "corpus", "tokens", "packing", "logps", "seeds", "instructions", "agree",
        "directory", "elements", "metrics", "standin", "tasks", "claims", "pool", "journal",
    ],
    2: [
        "checkpoint", "decoding", "shards", "rephrase", "contamination", "manifest", "windows", "activations", "curves",
        "scoring",
    ],
    3: ["upscale", "merge", "sampling", "data", "dist", "restore", "examples", "perplexity", "similarity", "seams"],
    4: ["base", "packed", "reference", "mathdata", "snapshot", "search", "answers", "heldout"],
    5: ["inputs", "recipe", "analyze", "evaluate", "evidence", "trials"],
    6: ["reproduce"],
}  # fmt: skip
REQUIRED = {"torch", "numpy", "sentencepiece", "safetensors", "triton"}
OPTIONAL = {
    "solar/tokenizer.py": {"tokenizers"},
    "solar/analyze.py": {"matplotlib"},
    "solar/evidence.py": {"matplotlib"},
}
LAYER_OF = {f"solar.{name}": layer for layer, names in LAYERS.items() for name in names} | {"solar": -3}
SOURCES = [path for folder in ("solar", "kernels") for path in sorted((ROOT / folder).glob("**/*.py"))]
SOURCES += [ROOT / "generate.py", ROOT / "train.py"]
name_of = lambda path: path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth of the file; `from solar import cli` is `solar.cli`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= deeper & LAYER_OF.keys() or {node.module}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_arrows_point_down(path):
    own = {name for name in imports(path) if name.split(".")[0] in ("solar", "kernels", "generate", "train", "tests")}
    if path.parent.name == "kernels":
        assert own <= {"kernels"} | {f"kernels.{other.stem}" for other in path.parent.glob("*.py")}
        return
    if path.name == "__init__.py":
        assert imports(path) <= {"sys"}
        return
    layer = LAYER_OF.get(f"solar.{path.stem}", 6)  # the scripts stand above all
    if path.parent.name == "solar":
        assert f"solar.{path.stem}" in LAYER_OF, f"{name_of(path)} has no place in the table of layers"
    for name in own:
        below = 0 if name.split(".")[0] == "kernels" else LAYER_OF[name]
        assert below < layer, f"{name_of(path)} (layer {layer}) imports {name} (layer {below})"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_the_five_packages(path):
    packages = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert packages - {"solar", "kernels"} <= REQUIRED | OPTIONAL.get(name_of(path), set())


def test_nothing_in_solar_says_triton():
    assert not [name_of(path) for path in SOURCES if "kernels" not in path.parts and "triton" in imports(path)]


def test_one_forward_pass_fits_in_one_file():
    assert len((ROOT / "solar/model.py").read_text().splitlines()) <= 300


def test_a_training_step_is_at_most_25_lines():
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    step = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "training_step")
    after_docstring = step.body[1]
    assert step.end_lineno - after_docstring.lineno + 1 <= 25


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_functions_say_what_they_do(path):
    """A docstring on every public function and class, except the forward passes that their module's head explains."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    self_evident = {"forward", "main", "__init__", "backward", "load"}
    bare = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and node.name not in self_evident
        and not ast.get_docstring(node)
    }
    told = {"RMSNorm", "Attention", "MLP", "DecoderLayer", "Linear", "Options"}  # explained at the head of their file
    short = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and len(node.body) <= 9}
    assert not bare - told - short, f"{name_of(path)}: no docstring on {sorted(bare - told - short)}"


def test_pins_agree():
    """requirements.txt pins what pyproject.toml requires, and triton is the one that torch's CUDA build demands."""
    pins = (ROOT / "requirements.txt").read_text()
    declared = set(re.findall(r'^    "([a-z]+)', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))
    assert declared >= REQUIRED
    assert set(re.findall(r"^([a-z]+)", pins, flags=re.MULTILINE)) == REQUIRED
    assert "torch==2.13.0" in pins
    assert 'triton==3.7.1; sys_platform == "linux"' in pins


def test_every_make_target_has_a_gloss():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE)) - {"check", "check-dev"}
    glossed = set(re.findall(r"^([a-z][a-z-]*):.*  ## \w", makefile, flags=re.MULTILINE))
    assert targets == glossed
    assert {"help", "setup", "upscale", "test", "test-full"} <= targets
