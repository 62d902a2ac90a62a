"""What holds for the whole project: its recipes load, its code keeps the house rules, its README tells the truth."""

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

from dpoctl.core.losses import LOSSES
from dpoctl.data.formats import FORMATS
from dpoctl.recipe import load_recipe, schema, schema_data
from dpoctl.recipe.contrastive import load_contrastive
from dpoctl.recipe.section import Section

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "dpoctl").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))
COMMANDS = {"sft", "dpo", "check", "convert-data", "eval", "report", "chat", "merge", "inspect"}


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def where(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_recipe_loads_for_its_method(file):
    method = yaml.safe_load(file.read_text(encoding="utf-8"))["method"]
    if method == "contrastive":
        assert load_contrastive(file).model.model_name_or_path.startswith("runs/")
        return
    recipe = load_recipe(file, command=method, losses=LOSSES, formats=FORMATS)
    assert recipe.method == method
    assert recipe.training.output_dir.startswith("runs/")


def test_the_steps_of_the_demo_hand_their_work_on():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    first, second, last = (ROOT / f"recipes/reviewer2-{step}.yaml" for step in ("sft", "contrastive", "dpo"))
    sft = load_recipe(first, command="sft", losses=LOSSES, formats=FORMATS)
    pairs = load_contrastive(second)
    dpo = load_recipe(last, command="dpo", losses=LOSSES, formats=FORMATS)
    assert pairs.model.model_name_or_path == dpo.model.model_name_or_path == sft.training.output_dir
    (output,) = re.findall(r"contrastive -o (\S+)\.jsonl", makefile)
    files = {split: f"{output}-{split}.jsonl" for split in pairs.splits}
    assert [dpo.data.train[0].path, dpo.data.eval["eval"][0].path] == [files["train"], files["test"]]
    for made in (sft.training.output_dir + "/model.safetensors", dpo.training.output_dir + "/model.safetensors"):
        assert f"\n{made}: " in makefile
    assert f"eval {dpo.training.output_dir}\n" in makefile


def sections() -> list[type[Section]]:
    classes = {value for module in (schema, schema_data) for value in vars(module).values() if isinstance(value, type)}
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
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, where(file, node)


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
    required = {name.lower() for name in re.findall(r'"([\w-]+)[>=]=', pyproject)} - {"hatchling", "wandb", "trackio"}
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


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```(?:bash|sh|shell|console|text)?\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines]


def test_the_readme_names_real_make_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", "\n".join(readme_commands()) + readme(), re.MULTILINE))
    assert {"demo", "test", "check"} <= named <= targets


def test_the_readme_names_real_commands_and_files():
    called = [line.split() for line in readme_commands() if line.startswith("dpoctl ")]
    assert {"sft", "dpo"} <= {words[1] for words in called} <= COMMANDS | {"--version", "--help"}
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", readme())
    recipes = re.findall(r"\brecipes/[\w./-]+\.ya?ml", readme())
    assert [name for name in links + recipes if not (ROOT / name).exists()] == []


def test_continuous_integration_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    for target in ("check", "test"):
        assert re.search(rf"make .*\b{target}\b", text)
