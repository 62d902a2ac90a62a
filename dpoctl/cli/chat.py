"""`dpoctl chat`."""

from typing import Annotated

import typer

from dpoctl.cli import options

Prompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Answer this, and end; without it, talk.", show_default=False),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="A system message before the first turn.", show_default=False)
]
Reference = Annotated[bool, typer.Option("--reference", help="Show what the reference answers, too.")]
Temperature = Annotated[float, typer.Option(metavar="T", min=0.0, help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(metavar="P", min=0.0, max=1.0, help="Draw from this share of the probability.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="The longest answer.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="The same seed and prompt give the same answer.")]


def chat(
    run: options.RunPath,
    prompt: Prompt = None,
    system: System = None,
    reference: Reference = False,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl chat runs/mistral7b-dpo --prompt "Is this paper any good?" --reference[/]

    Talk with a finished run, through the chat template that it was saved with.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.model.generate import Sampling
    from dpoctl.tasks.chat import run as talk

    talk(
        run,
        prompt=prompt,
        system=system,
        reference=reference,
        sampling=Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed),
        json_output=json_output,
    )
