"""`dpoctl check`."""

import json
from typing import Annotated

import typer

from dpoctl.cli import options

NoData = Annotated[
    bool, typer.Option("--no-data", help="Look at the recipe alone, not at its data, tokenizer and model.")
]


def check(
    recipe: options.RecipePath,
    overrides: options.Overrides = None,
    settings: options.Set = None,
    no_data: NoData = False,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl check recipes/mistral7b-lora.yaml --no-data[/]

    Advice on a recipe: what is wrong in it, what is unusual, and what its data and model show. Nothing is trained.
    """  # noqa: D415 - the help shows an example first
    from dpoctl import console
    from dpoctl.core.losses import LOSSES
    from dpoctl.data.formats import FORMATS
    from dpoctl.recipe import RecipeError, examine_recipe, read_text
    from dpoctl.recipe.advice import advise, count_grades

    text, given = read_text(recipe), [*(settings or []), *(overrides or [])]
    try:
        seen = examine_recipe(text, str(recipe), overrides=given, losses=LOSSES, formats=FORMATS)
    except RecipeError as refused:
        findings = advise(None, problems=refused.problems)
    else:
        facts = None
        if seen.recipe is not None and not no_data:
            from dpoctl.tasks.check import look

            facts = look(seen.recipe, is_sound=not seen.problems)
        findings = advise(seen.recipe, seen.document, facts, seen.problems)
    counts = count_grades(findings)
    if json_output:
        found = [finding.to_dict() for finding in findings]
        console.emit(json.dumps({"recipe": str(recipe), "findings": found, "counts": counts}))
    else:
        for finding in findings:
            console.emit(str(finding))
        told = [f"{count} {grade}{'s' if count > 1 else ''}" for grade, count in counts.items() if count]
        console.say(f"{recipe}: {', '.join(told) or 'nothing to say against it'}")
    if counts["error"]:
        raise typer.Exit(2)
