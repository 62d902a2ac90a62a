"""What holds for the whole project: its recipes load, its code keeps its rules, its README tells the truth."""

import ast
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from typer.main import get_command

from dpoctl.cli.app import app
from dpoctl.errors import UserError
from dpoctl.recipe import Recipe, parse_recipe, schema
from dpoctl.recipe.pair_generation import load_contrastive
from dpoctl.recipe.sampled_pairs import load_sampled
from dpoctl.recipe.section import Section
from dpoctl.runs.signals import SIGNALS

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "dpoctl").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))
COMMANDS = {command.name for command in app.registered_commands}


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def where(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def load_recipe(file: Path, *, command: str) -> Recipe:
    return parse_recipe(file.read_text(encoding="utf-8"), file.name, command=command)


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_recipe_loads_for_its_method(file):
    method = yaml.safe_load(file.read_text(encoding="utf-8"))["method"]
    if method in ("contrastive", "sampled"):
        recipe = load_contrastive(file) if method == "contrastive" else load_sampled(file)
        assert recipe.model.model_name_or_path.startswith("runs/")
        return
    recipe = load_recipe(file, command=method)
    assert recipe.method == method
    assert recipe.training.output_dir.startswith("runs/")


def test_the_steps_of_the_demo_hand_their_work_on():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    first, second, last = (ROOT / f"recipes/reviewer2-{step}.yaml" for step in ("sft", "contrastive", "dpo"))
    sft = load_recipe(first, command="sft")
    pairs = load_contrastive(second)
    dpo = load_recipe(last, command="dpo")
    assert pairs.model.model_name_or_path == dpo.model.model_name_or_path == sft.training.output_dir
    (output,) = re.findall(r"contrastive -o (\S+)\.jsonl", makefile)
    files = {split: f"{output}-{split}.jsonl" for split in pairs.splits}
    assert [dpo.data.train[0].path, dpo.data.eval["eval"][0].path] == [files["train"], files["test"]]
    for made in (sft.training.output_dir + "/model.safetensors", dpo.training.output_dir + "/model.safetensors"):
        assert f"\n{made}: " in makefile
    assert f"eval {dpo.training.output_dir}\n" in makefile


def sections() -> list[type[Section]]:
    classes = {value for module in (schema, schema) for value in vars(module).values() if isinstance(value, type)}
    return [kind for kind in classes if issubclass(kind, Section) and kind is not Section]


def test_every_recipe_key_is_read_outside_the_recipe_package():
    read = {
        node.attr
        for file in SOURCES
        if file.parent.name != "recipe"
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    keys = {(kind.__name__, key) for kind in sections() for key in kind.model_fields}
    assert len(keys) > 50
    # `version` is a guard that the schema itself checks.
    assert {key for key in keys if key[1] not in read} - {("Recipe", "version")} == set()


@pytest.mark.parametrize("file", SOURCES + TESTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_and_functions_stay_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 550
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, where(file, node)


def test_every_public_class_has_a_name_of_its_own():
    places: dict[str, list[str]] = {}
    for file in SOURCES:
        for node in parse(file).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(where(file, node))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {
    *("eval", "exec", "torch.load", "os.system", "os.popen", "pickle.load", "pickle.loads"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
}
UNSAFE_ARGUMENTS = {("shell", True), ("allow_pickle", True), ("weights_only", False)}


def unsafe(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What could run code out of a data file, or through a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((node, name) for name in imported if name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.Call):
            if (called := ast.unparse(node.func)) in UNSAFE_CALLS:
                yield node, called
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in UNSAFE_ARGUMENTS:
                    yield node, f"{keyword.arg}={keyword.value.value}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_can_run_code_out_of_a_file(file):
    assert [f"{where(file, node)}: {what}" for node, what in unsafe(parse(file))] == []


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from joblib import load", "torch.load(p)", "yaml.load(t, Loader=L)", "eval(t)", "exec(t)"),
        *("run(c, shell=True)", "np.load(p, allow_pickle=True)", "read(p, weights_only=False)"),
    ],
)
def test_the_scan_for_unsafe_code_sees_it(code):
    assert len(list(unsafe(ast.parse(code)))) == 1


def test_the_scan_for_unsafe_code_lets_the_rest_pass():
    assert list(unsafe(ast.parse("model.eval(); yaml.safe_load(t); run(c, shell=False); import torch"))) == []


QUESTION = re.compile(r"(What|Which|Whether|How|Where)\b")


def questions(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Docstrings that open like a question; `Whether` is right for a function that returns a bool."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            line = (ast.get_docstring(node) or "").split("\n")[0]
            returns = getattr(node, "returns", None)
            answer = "Whether" if returns is not None and ast.unparse(returns) in ("bool", "'bool'") else None
            if (opening := QUESTION.match(line)) and opening[1] != answer:
                yield node, line


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_docstring_says_what_a_thing_is_or_does(file):
    assert [f"{where(file, node)}: {line}" for node, line in questions(parse(file))] == []


@pytest.mark.parametrize(
    "code",
    [
        *('"""What a run writes."""', 'class A:\n    """Which rows."""', 'def f():\n    """How it ends."""'),
        *('def f() -> bool:\n    """Where it is."""', 'def f() -> int:\n    """Whether it is."""'),
        *('async def f():\n    """Whether it is."""', 'class A:\n    def f(self):\n        """\n        What: it."""'),
        'def f() -> "TypeGuard[int]":\n    """Whether it is."""',
    ],
)
def test_the_scan_for_questions_sees_them(code):
    assert len(list(questions(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code",
    [
        *('def f() -> bool:\n    """Whether it is."""', 'def f() -> "bool":\n    """Whether it is."""'),
        *('"""However it ends."""', 'def f():\n    """Say what it is.\n\n    What it is not."""', "def f(): pass"),
    ],
)
def test_the_scan_for_questions_lets_the_rest_pass(code):
    assert list(questions(ast.parse(code))) == []


def project_files() -> list[Path]:
    """All text files that belong to the project, with or without git."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    return [*SOURCES, *TESTS, *RECIPES, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile"]


def test_no_file_names_the_machine_it_was_written_on():
    # Spelt in two parts, so that this file does not hold what it looks for.
    words = ["/wo" + "rk/", "shared/ref" + "erence", "shared/se" + "eds", "DESIGN" + ".md", "file:///" + "opt"]
    found = []
    for file in project_files():
        text = file.read_text(encoding="utf-8", errors="replace")
        found += [f"{file.relative_to(ROOT)}: {word}" for word in words if word in text]
    assert found == []


def test_a_constraint_pins_every_dependency_exactly():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r'"([\w.-]+)[>=]=', pyproject)}
    required = names - {"hatchling", "wandb", "trackio"}
    assert required - pinned == set()


# The oldest versions without a known hole that a model, a template or a file of strangers could use.
SAFE = {
    "torch": "2.10",  # CVE-2025-32434, CVE-2026-24747: reading weights
    "transformers": "5.3",  # CVE-2026-1839, CVE-2026-4372: random states, kernels named by a config
    "jinja2": "3.1.6",  # CVE-2024-56326: out of the sandbox
    "pyyaml": "5.4",  # CVE-2020-14343: the full loader
}


def floors() -> dict[str, Version]:
    """The oldest version of each dependency that is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for texts in project["optional-dependencies"].values() for text in texts)]
    found = {}
    for text in texts:
        needed = Requirement(text)
        (bound,) = needed.specifier
        assert bound.operator in (">=", "=="), text
        found[needed.name.lower()] = Version(bound.version)
    return found


def test_no_version_with_a_known_hole_is_installed():
    assert {name: str(floors()[name]) for name, safe in SAFE.items() if floors()[name] < Version(safe)} == {}


def test_the_pinned_versions_are_ones_that_the_project_takes():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower(): Version(line.split("==")[1]) for line in lines if line[0] != "#"}
    assert {name: str(pinned[name]) for name, floor in floors().items() if pinned.get(name, floor) < floor} == {}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
per_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [text for language, text in fenced if language in languages]


def shown_commands(page: Path) -> list[list[str]]:
    """The words of each line that a reader may type, without comments."""
    spans = re.findall(r"`((?:dpoctl|make) [^`\n]+)`", text_of(page))
    lines = [line.split(" # ")[0] for block in blocks(page, "sh", "") for line in block.splitlines()]
    return [words for line in (*lines, *spans) if (words := re.split(r"[\s|]+", line.replace("\\", "").strip()))]


def calls_of_dpoctl(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each shown command of dpoctl with its arguments."""
    for words in shown_commands(page):
        if "dpoctl" in words[:-1] and words[0] in ("dpoctl", "accelerate", "torchrun"):
            name, *rest = words[words.index("dpoctl") + 1 :]
            if name in COMMANDS or not re.match(r"[A-Z-]", name):
                yield name, rest


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


def test_the_readme_shows_where_to_start():
    shown = shown_commands(ROOT / "README.md")
    assert {"demo", "test", "check"} <= {words[1] for words in shown if words[0] == "make"}
    assert {"sft", "dpo", "eval"} <= {name for name, _ in calls_of_dpoctl(ROOT / "README.md")}


def test_the_readme_installs_the_torch_of_the_constraints():
    named = re.findall(r"\btorch==([\d.]+)", text_of(ROOT / "README.md"))
    assert [f"torch=={version}" for version in named] == re.findall(
        r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )


def test_the_recipe_in_the_readme_loads():
    (block,) = blocks(ROOT / "README.md", "yaml")
    recipe = parse_recipe(block, "mine.yaml", command="dpo")
    assert recipe.training.output_dir == "runs/mine"
    assert len(block.splitlines()) <= 10


@per_page
def test_a_page_names_real_make_targets(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {words[1] for words in shown_commands(page) if words[0] == "make"} <= targets


@per_page
def test_a_page_names_real_commands_with_real_options(page):
    commands = get_command(app).commands
    for name, arguments in calls_of_dpoctl(page):
        assert name in COMMANDS
        known = {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}
        given = {word.split("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
        assert given <= known, name


@per_page
def test_a_page_names_real_files_and_sections(page):
    recipes = re.findall(r"\brecipes/[\w./-]+\.ya?ml", text_of(page))
    assert [name for name in recipes if not (ROOT / name).is_file()] == []
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text_of(page)):
        target = page.parent / file if file else page
        assert target.exists(), file
        if anchor:
            assert anchor in {slug(line.lstrip("# ")) for line in text_of(target).splitlines() if line.startswith("#")}


def test_the_page_of_the_architecture_names_real_files_and_what_they_define():
    page = text_of(ROOT / "docs" / "architecture.md")
    files = {name: [f for f in SOURCES + TESTS if f.match(name)] for name in re.findall(r"`([\w/]+\.py)`", page)}
    assert [name for name, found in files.items() if not found] == []
    for row in re.findall(r"^\| (?:Where|What|Which|How) .*$", page, re.MULTILINE):
        code = "".join(text_of(f) for name in re.findall(r"`([\w/]+\.py)`", row) for f in files[name])
        assert [name for name in re.findall(r"`(?:\w+\.)?(\w+)`", row) if not re.search(rf"\b{name}\b", code)] == [], (
            row
        )


def test_every_page_can_be_reached_from_the_readme():
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name})" not in text_of(PAGES[0])] == []


def test_the_page_of_the_command_line_is_complete():
    page = text_of(ROOT / "docs" / "cli.md")
    code = "\n".join(file.read_text(encoding="utf-8") for file in SOURCES)
    variables = set(re.findall(r"\bDPOCTL_[A-Z_]+", code)) | set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", code))
    assert {name for name in variables if name.isupper() and not re.search(rf"\b{name}\b", page)} == set()
    codes = {kind.exit_code for kind in (UserError, *UserError.__subclasses__())} | {128 + number for number in SIGNALS}
    assert {code for code in codes if not re.search(rf"^\|[\d, ]*\b{code}\b", page, re.MULTILINE)} == set()
    assert {name for name in COMMANDS if f"dpoctl {name} " not in page} == set()


def test_continuous_integration_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    for target in ("check", "test"):
        assert re.search(rf"make .*\b{target}\b", text)


def made(target: str, *variables: str) -> str:
    """The commands of a target of the Makefile, from nothing."""
    done = subprocess.run(
        ["make", "-n", "-B", target, *variables], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_demo_installs_what_a_user_needs_and_says_how_much_that_is():
    demo, test = made("demo", "HAS_GPU=", "OWN_INDEX="), made("test", "HAS_GPU=", "OWN_INDEX=")
    assert "[dev]" not in demo
    assert "[dev]" in test
    assert demo.index("To download: about") < demo.index("pip install") < demo.index("dpoctl sft")
    assert "--quiet" not in demo
    assert ("/whl/cpu torch" in demo) == (os.uname().sysname == "Linux")
    assert "/whl/cpu" not in made("demo", "HAS_GPU=/usr/bin/nvidia-smi", "OWN_INDEX=")
    assert "/whl/cpu" not in made("demo", "HAS_GPU=", "OWN_INDEX=global.extra-index-url")
    assert "/whl/cpu" not in made("demo", "HAS_GPU=", "OWN_INDEX=", "TORCH_INDEX=")
