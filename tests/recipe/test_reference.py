"""docs/recipe.md: written by `make docs`, with every key of every section and loss."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from dpoctl.losses import LOSSES
from dpoctl.recipe.data_section import Source
from dpoctl.recipe.loader import keys_of
from dpoctl.recipe.pair_generation import ContrastiveRecipe
from dpoctl.recipe.reference import recipe_reference
from dpoctl.recipe.sampled_pairs import SampledRecipe
from dpoctl.recipe.schema import Recipe

FILE = Path(__file__).parents[2] / "docs" / "recipe.md"
PAGE = recipe_reference()


def tables(page: str) -> dict[str, dict[str, list[str]]]:
    """The rows of each table by their key, each table by its heading."""
    found: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").replace("`", "")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.setdefault(heading, {})[cells[0].strip("`")] = cells
    return found


TABLES = tables(PAGE)


def test_the_page_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == PAGE, "run `make docs`"


def test_the_page_does_not_depend_on_what_was_imported_before() -> None:
    """Python keeps one object for unions of equal literals, in the order that it saw first."""
    code = "import dpoctl.cli.app, dpoctl.recipe.reference as page; print(page.recipe_reference(), end='')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment).stdout
    assert printed.decode() == FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("root", "prefix"), [(Recipe, ""), (ContrastiveRecipe, "Contrastive: "), (SampledRecipe, "Sampled: ")]
)
def test_every_key_has_a_row_in_the_table_of_its_section(root: type, prefix: str) -> None:
    tops = {"": "Top level", "Contrastive: ": "Contrastive recipes", "Sampled: ": "Sampled recipes"}
    for path in keys_of(root):
        *section, key = map(str, path)
        title = f"{prefix}{'.'.join(section)}" if section else tops[prefix]
        # A section that several kinds of recipes have stands on the page once.
        shared = (title, ".".join(section), f"Contrastive: {'.'.join(section)}")
        assert any(key in TABLES.get(name, {}) for name in shared[: 1 if title in TABLES else 3]), path
    assert list(TABLES["data.train"]) == list(Source.model_fields)


def test_every_loss_has_a_table_of_its_keys() -> None:
    for name, loss in LOSSES.items():
        assert set(TABLES[name]) == {field.name for field in fields(loss)}
        assert TABLES[name]["beta"][2] == f"`{loss().beta}`"


def test_the_page_of_losses_has_a_row_for_every_loss() -> None:
    page = FILE.with_name("losses.md").read_text(encoding="utf-8")
    assert [name for name in LOSSES if f"\n| `{name}` | " not in page] == []


def test_every_row_has_a_type_a_default_and_a_meaning() -> None:
    for title, rows in TABLES.items():
        for name, cells in rows.items():
            assert len(cells) == 4, (title, name)
            assert all(cells), (title, name)
            assert len(cells[3]) > 5, (title, name)
            assert "another value" not in cells[1], (title, name)


def test_every_link_to_a_section_has_its_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert len(anchors) == len(headings)
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert len(links) > 15
    assert set(links) <= anchors
