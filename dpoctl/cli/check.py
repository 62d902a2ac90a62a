"""The `dpoctl check` command."""

import json
from typing import Annotated

import typer

from dpoctl import console
from dpoctl.cli import options
from dpoctl.tasks import import_libraries

NoData = Annotated[
    bool, typer.Option("--no-data", help="Check only the recipe: read no data, no tokenizer and no model.")
]


Strict = Annotated[bool, typer.Option("--strict", help="Exit with code 2 for warnings too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no notes, and nothing if nothing is wrong.")]


Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="The GPU that the run must fit on; see plan.", show_default=False),
]


def check(
    recipe: options.RecipePath,
    overrides: options.Overrides = None,
    settings: options.Set = None,
    no_data: NoData = False,
    strict: Strict = False,
    quiet: Quiet = False,
    gpu: Gpu = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl check recipes/mistral7b-lora.yaml --no-data[/]

    Report what is wrong or unusual in a recipe, its data, its tokenizer and its model. Nothing is trained.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.recipe import RecipeError, examine_recipe, read_text
    from dpoctl.recipe.advice import advise, count_severities

    text, changes = read_text(recipe), [*(settings or []), *(overrides or [])]
    try:
        examined = examine_recipe(text, str(recipe), overrides=changes)
    except RecipeError as error:
        findings = advise(None, problems=error.problems)
    else:
        facts = None
        # Advice on values that are not understood would be advice on the defaults and examples in their place.
        known = examined.recipe if examined.is_understood else None
        if known is not None and not no_data:
            import_libraries()
            from dpoctl.tasks.check import gather_facts

            facts = gather_facts(known, is_sound=not examined.problems, file=recipe, gpu=gpu)
        findings = advise(known, examined.document, facts, examined.problems)
    counts = count_severities(findings)
    if json_output:
        found = [finding.to_dict() for finding in findings]
        console.emit(json.dumps({"recipe": str(recipe), "findings": found, "counts": counts}))
    else:
        for finding in findings:
            if not (quiet and finding.severity == "note"):
                console.emit(finding.text())
        totals = [f"{count} {grade}{'s' if count > 1 else ''}" for grade, count in counts.items() if count]
        if not quiet or counts["error"] or counts["warning"]:
            console.say(f"{recipe}: {', '.join(totals) or 'nothing wrong or unusual found'}")
    if counts["error"] or (strict and counts["warning"]):
        raise typer.Exit(2)
