"""`dpoctl chat RUN`: chat with the model of a finished run, and with its reference."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dpoctl import console
from dpoctl.data.records import Message
from dpoctl.data.tokenize import render_prompt
from dpoctl.errors import UsageError, UserError
from dpoctl.model.generate import Generation, SamplingParams, generate, stream
from dpoctl.tasks.earlier_step import with_model
from dpoctl.tasks.finished_run import FinishedRun, best_device
from dpoctl.tasks.setup import quiet_libraries

with suppress(ImportError):
    import readline  # noqa: F401 - gives `input` line editing, if the platform has it

RESET, HELP = "/reset", "/help"
COMMANDS = f"Ctrl-C stops an answer, {RESET} starts a new conversation, {HELP} shows this line, Ctrl-D exits"


def run(
    run: Path,
    *,
    prompt: str | None = None,
    system: str | None = None,
    reference: bool = False,
    sampling: SamplingParams,
    json_output: bool = False,
) -> None:
    """Answer one prompt, or chat until the input ends.

    Args:
        run: the run directory.
        prompt: the prompt to answer; None makes every line of the input a turn.
        system: a system message before the first turn.
        reference: show the reference's answer too.
        sampling: the sampling parameters.
        json_output: print one JSON object for each turn instead of text.
    """
    quiet_libraries()
    finished = FinishedRun.load(with_model(run), best_device())
    models: dict[str, Enter] = {"reference": finished.reference} if reference else {}
    models["policy"] = lambda: nullcontext(finished.policy.causal)
    chat = Chat(finished, models, sampling, system)
    if prompt is None:
        _chat_until_end(chat, json_output=json_output)
    elif json_output:
        console.emit(chat.answer_json(prompt))
    else:
        chat.stream(prompt)


Enter = Callable[[], AbstractContextManager[PreTrainedModel]]


@dataclass
class Chat:
    """A conversation with the model of a run.

    Attributes:
        run: the run, with tokenizer and recipe.
        models: the models that answer, by name, the policy last; its answers become part of the conversation.
        sampling: the sampling parameters.
        system: the system message before the first turn.
        turns: the conversation so far.
    """

    run: FinishedRun
    models: dict[str, Enter]
    sampling: SamplingParams
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.has_template and self.system is not None:
            raise UsageError(
                "--system: the tokenizer of this run has no chat template, so it takes no system message",
                hint="put the text into the prompt",
            )

    @property
    def has_template(self) -> bool:
        """Whether turns are messages; without a template each turn is a separate text that the model continues."""
        return self.run.tokenizer.chat_template is not None

    def stream(self, text: str) -> None:
        """Print the answers to a turn on stdout while they are generated."""
        ids = self._token_ids(text)
        answer = ""
        for name, enter in self.models.items():
            if len(self.models) > 1:
                console.emit(f"{name}: ", end="")
            answer = ""
            try:
                # Closed before the adapters are switched: another thread generates.
                with enter() as causal, closing(self._stream(causal, ids)) as pieces:
                    for piece in pieces:
                        answer += piece
                        console.emit(piece, end="")
            finally:
                console.emit("")
        self._add_turn(text, answer)

    def answer_json(self, text: str) -> str:
        """Answer a turn, as one line of JSON: the prompt, each answer, and whether the answer is complete."""
        answers = {name: self._answer(enter, text) for name, enter in self.models.items()}
        self._add_turn(text, answers["policy"].text)
        texts = {name: answer.text for name, answer in answers.items()}
        finished = {f"{name}_finished": answer.finished for name, answer in answers.items()}
        return json.dumps({"prompt": text, **texts, **finished}, ensure_ascii=False)

    def reset(self) -> None:
        """Start a new conversation."""
        self.turns.clear()

    def _stream(self, causal: PreTrainedModel, ids: list[int]) -> Any:
        return stream(causal, self.run.tokenizer, ids, self.sampling)

    def _answer(self, enter: Enter, text: str) -> Generation:
        with enter() as causal:
            (answer,) = generate(causal, self.run.tokenizer, [self._token_ids(text)], self.sampling)
        return answer

    def _token_ids(self, text: str) -> list[int]:
        """Return the token ids of the conversation with a new turn, as in training."""
        turn = {"role": "user", "content": text}
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompt = [*opening, *self.turns, turn] if self.has_template else text
        return render_prompt(self.run.tokenizer, prompt, self.run.recipe.data.chat_template_kwargs)

    def _add_turn(self, text: str, answer: str) -> None:
        if self.has_template:
            self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _chat_until_end(chat: Chat, *, json_output: bool) -> None:
    """Answer each line until the input ends."""
    if sys.stdin.isatty():
        console.say(COMMANDS)
    if not chat.has_template:
        console.note("the tokenizer of this run has no chat template: the model continues each line as a separate text")
    for line in _lines():
        try:
            if line == RESET:
                chat.reset()
                console.say("new conversation")
            elif line == HELP:
                console.say(COMMANDS)
            elif json_output:
                console.emit(chat.answer_json(line))
            else:
                chat.stream(line)
        except KeyboardInterrupt:
            console.say("answer stopped; it is not part of the conversation")
        except UserError as error:
            # A conversation that is too long is no reason to exit.
            console.error(f"{error}; {RESET} starts a new conversation")


def _lines() -> Iterator[str]:
    """Yield the lines that are typed or piped in, without empty ones."""
    lines = _typed() if sys.stdin.isatty() else iter(sys.stdin)
    return (line.strip() for line in lines if line.strip())


def _typed() -> Iterator[str]:
    with suppress(EOFError):
        while True:
            # If stdout is a file, Python would write this prompt into it, among the answers.
            yield input("> " if sys.stdout.isatty() else "")
