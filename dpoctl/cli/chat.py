"""The `dpoctl chat` command."""

from typing import Annotated

import typer

from dpoctl.cli import options
from dpoctl.tasks import import_libraries

Prompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Answer this prompt and exit. Default: an interactive chat.", show_default=False),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="A system message for the conversation.", show_default=False)
]
Reference = Annotated[bool, typer.Option("--reference", help="Show the reference model's answer too.")]
Temperature = Annotated[
    float, typer.Option(metavar="T", min=0.0, help="Sampling temperature; 0 always takes the most likely token.")
]
TopP = Annotated[
    float, typer.Option(metavar="P", min=0.0, max=1.0, help="Sample from the most likely tokens of this total share.")
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Stop an answer after N tokens.")]
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

    Chat with the model of a finished run or of any other folder, through the chat template that was saved with it.
    """  # noqa: D415 - the help shows an example first
    import_libraries()
    from dpoctl.model.generate import SamplingParams
    from dpoctl.tasks.chat import run as chat_with

    chat_with(
        run,
        prompt=prompt,
        system=system,
        reference=reference,
        sampling=SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed),
        json_output=json_output,
    )
