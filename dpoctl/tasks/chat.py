"""`dpoctl chat RUN`: answers of a finished run, and of its reference beside them."""

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
from dpoctl.model.generate import Generation, Sampling, generate, stream
from dpoctl.tasks.finished import FinishedRun, best_device
from dpoctl.tasks.machine import quiet_libraries

with suppress(ImportError):
    import readline  # noqa: F401 - gives `input` its line editing, where the platform has it

RESET = "/reset"


def run(
    run: Path,
    *,
    prompt: str | None = None,
    system: str | None = None,
    reference: bool = False,
    sampling: Sampling,
    json_output: bool = False,
) -> None:
    """Answer one prompt, or talk until the input ends.

    Args:
        run: the run directory.
        prompt: what to answer; without one, every line of the input is a turn.
        system: a system message before the first turn.
        reference: show the reference's answer too.
        sampling: how answers are drawn.
        json_output: print one JSON object for each answer instead of text.
    """
    quiet_libraries()
    finished = FinishedRun.load(run, best_device())
    speakers: dict[str, Enter] = {"reference": finished.reference} if reference else {}
    speakers["policy"] = lambda: nullcontext(finished.policy.causal)
    chat = Chat(finished, speakers, sampling, system)
    if prompt is None:
        _talk(chat, json_output=json_output)
    elif json_output:
        console.emit(chat.describe(prompt))
    else:
        chat.show(prompt)


Enter = Callable[[], AbstractContextManager[PreTrainedModel]]


@dataclass
class Chat:
    """A conversation with a run.

    Attributes:
        run: its tokenizer, its template, and how the template was called in training.
        speakers: who answers, by name, the policy last; the conversation goes on with the policy's answers.
        sampling: how answers are drawn.
        system: a message that stands before the first turn.
        turns: what was said so far.
    """

    run: FinishedRun
    speakers: dict[str, Enter]
    sampling: Sampling
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.has_template and self.system is not None:
            raise UsageError("the run's tokenizer has no chat template, so there is no place for a system message")

    @property
    def has_template(self) -> bool:
        """Whether turns are messages; without a template each is a text of its own, to be continued."""
        return self.run.tokenizer.chat_template is not None

    def show(self, text: str) -> None:
        """Stream the answers to a turn to stdout."""
        ids = self._ask(text)
        said = ""
        for name, enter in self.speakers.items():
            if len(self.speakers) > 1:
                console.emit(f"{name}: ", end="")
            said = ""
            try:
                # Closed before the adapters are switched: a thread of its own generates.
                with enter() as causal, closing(self._stream(causal, ids)) as pieces:
                    for piece in pieces:
                        said += piece
                        console.emit(_harmless(piece) if sys.stdout.isatty() else piece, end="")
            finally:
                console.emit("")
        self._remember(text, said)

    def describe(self, text: str) -> str:
        """Answer a turn, as one line of JSON: the prompt, each answer, and whether it came to its end."""
        answers = {name: self._answer(enter, text) for name, enter in self.speakers.items()}
        self._remember(text, answers["policy"].text)
        texts = {name: answer.text for name, answer in answers.items()}
        finished = {f"{name}_finished": answer.finished for name, answer in answers.items()}
        return json.dumps({"prompt": text, **texts, **finished}, ensure_ascii=False)

    def reset(self) -> None:
        """Forget what was said."""
        self.turns.clear()

    def _stream(self, causal: PreTrainedModel, ids: list[int]) -> Any:
        return stream(causal, self.run.tokenizer, ids, self.sampling)

    def _answer(self, enter: Enter, text: str) -> Generation:
        with enter() as causal:
            (answer,) = generate(causal, self.run.tokenizer, [self._ask(text)], self.sampling)
        return answer

    def _ask(self, text: str) -> list[int]:
        """The token ids of the conversation with a new turn, as in training."""
        turn = {"role": "user", "content": text}
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompt = [*opening, *self.turns, turn] if self.has_template else text
        return render_prompt(self.run.tokenizer, prompt, self.run.recipe.data.chat_template_kwargs)

    def _remember(self, text: str, answer: str) -> None:
        if self.has_template:
            self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _talk(chat: Chat, *, json_output: bool) -> None:
    """Answer line after line until the input ends."""
    if sys.stdin.isatty():
        console.say(f"Ctrl-D ends, Ctrl-C ends an answer, {RESET} starts anew")
    if not chat.has_template:
        console.note("the run's tokenizer has no chat template: each line is continued as a text of its own")
    for line in _lines():
        try:
            if line == RESET:
                chat.reset()
                console.say("a new conversation")
            elif json_output:
                console.emit(chat.describe(line))
            else:
                chat.show(line)
        except KeyboardInterrupt:
            console.say("the answer was ended; it is not part of the conversation")
        except UserError as error:
            # One turn too many is no reason to lose the rest.
            console.error(f"{error}; {RESET} starts anew")


def _harmless(text: str) -> str:
    """Leave out what a terminal would obey instead of show; models have seen escape sequences too."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _lines() -> Iterator[str]:
    """The lines that are typed, or that a pipe brings, without the empty ones."""
    lines = _typed() if sys.stdin.isatty() else iter(sys.stdin)
    return (line.strip() for line in lines if line.strip())


def _typed() -> Iterator[str]:
    with suppress(EOFError):
        while True:
            # With stdout elsewhere Python would write the prompt there, among the answers.
            yield input("> " if sys.stdout.isatty() else "")
