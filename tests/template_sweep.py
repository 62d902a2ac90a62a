"""Every chat template with every shape of conversation: what is trained on, read back from the token ids.

`python tests/template_sweep.py` prints the tables of docs/templates.md.
"""

import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from chat_samples import OWN, assistant, build_tokenizer, system, user

from dpoctl.data import formats
from dpoctl.data.records import Record, Reject
from dpoctl.data.rendering import Rendered, Renderer
from dpoctl.data.tokenize import Encoder

found = importlib.util.find_spec("trl")
SHIPPED = Path(str(found.origin)).parent / "chat_templates" if found else Path("trl is not installed")
FILES = {path.stem: path for path in sorted(SHIPPED.glob("*.jinja")) if not path.stem.endswith("_training")}
FILES |= {f"{path.stem} (ours)": path for path in sorted(OWN.glob("*.jinja"))}
STOPS = {
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "glm": ["<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "llama3": ["<|eot_id|>", "<|eom_id|>"],
    "phi3": ["<|end|>"],
}
"""What stops generation beside the end-of-sequence token, by how the names of templates begin."""
MIDDLE_ENDS = {"gptoss": ["<|end|>"]}
"""What ends a turn without stopping generation."""


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": f"id{name}", "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(content: Any, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}},
    },
}
OSLO = call("weather", city="Oslo", days=17)
RESULT = {"role": "tool", "tool_call_id": "idweather", "name": "weather", "content": "rainfall"}
ASK, MORE, SORRY = user("What about it?"), user("And then?"), assistant("no idea at all")
SHAPES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]] = {
    "call": ([ASK], [calling("", OSLO)], {}),
    "text and call": ([ASK], [calling("Looking it up.", OSLO)], {"tools": [TOOL]}),
    "two calls": ([ASK], [calling("", OSLO, call("clock", zone="Mars", exact=2.5))], {"tools": [TOOL]}),
    "tool turns": ([ASK], [calling("", OSLO), RESULT, assistant("Umbrella needed.")], {"tools": [TOOL]}),
    "null content": ([ASK, calling(None, OSLO), RESULT], [calling(None, OSLO)], {}),
    "reasoning": ([ASK], [assistant("Umbrella needed.") | {"reasoning_content": "Clouds ahead."}], {}),
    "parts": ([user([{"type": "text", "text": "What?"}])], [assistant([{"type": "text", "text": "Part one"}])], {}),
    "system": ([system("Be kind."), ASK], [assistant("Umbrella needed.")], {}),
    "name": ([ASK], [assistant("Umbrella needed.") | {"name": "Wetterfrosch"}], {}),
    "two users": ([ASK, user("Well?")], [assistant("Umbrella needed.")], {}),
    "blanks": ([user(" What? \n")], [assistant("  Umbrella needed. \n")], {}),
    "control": ([user("Say {stop} {open}")], [assistant("It is {stop} and {open} here.")], {}),
    "empty": ([ASK], [assistant("")], {}),
}
"""A prompt, the turns that answer it, and further columns."""


def by_family(table: dict[str, list[str]], name: str) -> list[str]:
    return next((value for family, value in table.items() if name.startswith(family)), [])


class Case:
    """A template with the tokenizer of its family."""

    def __init__(self, name: str, text: str, *, special: bool = True) -> None:
        self.name = name
        self.tokenizer = build_tokenizer(name, text, special=special)
        self.stops = [str(self.tokenizer.eos_token), *by_family(STOPS, name)]
        self.ends = [*self.stops, *by_family(MIDDLE_ENDS, name)]
        self.ids = set(self.tokenizer.convert_tokens_to_ids(self.stops))
        self.encoder = Encoder(self.tokenizer)
        self.renderers = {on: Renderer(self.tokenizer, {}, on, self.ids) for on in ("last", "assistant")}

    def outcome(self, shape: str, kind: str, loss_on: str) -> str:
        """Return `trained`, the reason of a rejection with its detail, or what is wrong."""
        prompt, turns, columns = SHAPES[shape]
        if loss_on == "assistant":
            turns = [*turns, MORE, assistant("Take a coat.")]
        opening = self.renderers["last"].chat.generation_prompt.strip().split(">")[0] + ">"
        row = (
            {"messages": prompt + turns} if kind == "sft" else {"prompt": prompt, "chosen": turns, "rejected": [SORRY]}
        )
        row = json.loads(json.dumps(row | columns).replace("{stop}", self.stops[-1]).replace("{open}", opening))
        try:
            record = formats.read("messages" if kind == "sft" else "trl-explicit", row, {})
            rendered = self.renderers[loss_on].render(record)
        except Reject as reject:
            return f"{reject.reason}: {reject.detail}"
        (_, answers) = self.encoder.encode([rendered])[0]
        response = record.responses[0]
        trained = [turn for turn in response if turn["role"] == "assistant"]
        return self.judge(answers[0], trained if loss_on == "assistant" else trained[-1:], rendered.notes)

    def judge(self, answer: Any, turns: list[dict[str, Any]], notes: tuple[str, ...]) -> str:
        runs = [self.tokenizer.decode(run) for run in trained_runs(answer)]
        text, at = "\0".join(runs), 0
        if "What" in text or "And then" in text or "rainfall" in text:
            return f"WRONG: what others say is trained on: {runs}"
        for turn in turns:
            for value in values_of(turn):
                if value not in text[at:] and "thinking_dropped" not in notes:
                    return f"WRONG: {value!r} is not trained on: {runs}"
            at = text.find(turn["content"].strip(), at) + len(turn["content"].strip())
        if answer.ids[-1] not in self.ids or (len(answer.ids) > 1 and answer.ids[-2] in self.ids):
            return f"WRONG: the end: {runs}"
        if not all(run.endswith(tuple(self.ends)) for run in runs):
            return f"WRONG: an end of turn: {runs}"
        return "trained" + (f" ({', '.join(notes)})" if notes else "")


def values_of(turn: dict[str, Any]) -> Iterator[str]:
    yield turn["content"].strip()
    yield turn.get("reasoning_content", "")
    for one in turn.get("tool_calls", []):
        yield one["function"]["name"]
        for key, value in one["function"]["arguments"].items():
            yield from (key, str(value))


def trained_runs(answer: Any) -> list[list[int]]:
    marked = zip(answer.ids, answer.scored, strict=True)
    return [[token for token, _ in run] for flag, run in groupby(marked, key=lambda item: item[1]) if flag]


def cells(case: Case) -> Iterator[tuple[str, str, str, str]]:
    """Yield shape, kind, `loss_on` and outcome of each cell of a template."""
    for shape in SHAPES:
        for kind in ("sft", "pairs"):
            for loss_on in ("last", "assistant"):
                yield shape, kind, loss_on, case.outcome(shape, kind, loss_on)


def symbol(outcome: str) -> str:
    """Shorten an outcome for the table."""
    if outcome.startswith("trained"):
        return "w" if "thinking_dropped" in outcome else "+"
    reason = outcome.partition(":")[0]
    return {"template_refuses": "refused", "prompt_moved": "moved", "empty_answer": "empty"}.get(
        reason, reason.removesuffix("_dropped").removesuffix("_refused").replace("_", " ")
    )


def table() -> str:
    """Return the outcomes as Markdown, templates with the same ones in one line."""
    lines = defaultdict(list)
    for label, path in FILES.items():
        found = defaultdict(set)
        for shape, _, _, outcome in cells(Case(path.stem, path.read_text(encoding="utf-8"))):
            found[shape].add(symbol(outcome))
        lines[tuple(" / ".join(sorted(found[shape])) for shape in SHAPES)].append(label)
    head = ["templates", *SHAPES]
    rows = [[", ".join(labels), *line] for line, labels in sorted(lines.items(), key=lambda item: item[1])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


THINKS = assistant("Umbrella needed.") | dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "Clouds ahead.")
INLINE = assistant("<think>\nClouds ahead.\n</think>\n\nUmbrella needed.")


def thinking_of(case: Case) -> tuple[str, ...]:
    """Return what a template does with thinking: the cells of its line in the table."""
    start = case.renderers["last"].chat.generation_prompt
    opens = "ended" if start.rstrip().endswith("</think>") else "opened" if start.rstrip().endswith("<think>") else ""
    kept = {name: _keeps(case, [turn]) for name, turn in (("last", THINKS), ("content", INLINE))}
    empty = _rendered(case, [assistant("Umbrella needed.")])
    is_written = not isinstance(empty, str) and "thinking_empty" in empty.notes
    return kept["last"], _keeps(case, [THINKS, MORE, SORRY]), kept["content"], opens, "written" if is_written else ""


def _keeps(case: Case, turns: list[dict[str, Any]]) -> str:
    rendered = _rendered(case, turns)
    if isinstance(rendered, str):
        return rendered
    ((start, end), *_) = rendered.completions[0].spans
    return "kept" if "Clouds ahead." in rendered.completions[0].text[start:end] else "dropped"


def _rendered(case: Case, turns: list[dict[str, Any]]) -> Rendered | str:
    try:
        return case.renderers["assistant"].render(Record([ASK], (turns,)))
    except Reject as reject:
        return f"`{reject.reason}`"


def thinking_table() -> str:
    """Return what templates do with thinking as Markdown; those that drop all of it stand in the last line."""
    lines = defaultdict(list)
    for label, path in FILES.items():
        lines[thinking_of(Case(path.stem, path.read_text(encoding="utf-8")))].append(label)
    head = ["templates", "last turn", "earlier turns", "`<think>` in the content", "before the answer", "empty block"]
    rows = [[", ".join(labels), *line] for line, labels in sorted(lines.items(), reverse=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table() + "\n" + thinking_table())
