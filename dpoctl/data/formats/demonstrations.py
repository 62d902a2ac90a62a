"""Formats of one answer: demonstrations, and unpaired feedback."""

from typing import Any

from dpoctl.data.formats.common import assistant, checked, columns, read_sharegpt, system_turn, text_columns, user
from dpoctl.data.formats.trl import SYNONYMS, messages, prompt_completion
from dpoctl.data.messages import SHAPE, read_messages
from dpoctl.data.records import Message, Record, Reject, Row

PROMPTS = ("prompt", *SYNONYMS["prompt"])
COMPLETIONS = ("completion", "response", "answer", "output", "target")


def sharegpt(row: Row) -> Record:
    """ShareGPT: `conversations` of `from` and `value`, and optionally `system` and `tools`."""
    return messages({"messages": _conversations(row)})


def llamafactory_kto(row: Row) -> Record:
    """LLaMA-Factory's unpaired feedback: a conversation, and `kto_tag` or `label`, true if its last answer is good."""
    found = [row[name] for name in ("kto_tag", "label") if isinstance(row.get(name), bool)]
    if len(found) != 1:
        raise Reject(SHAPE, "needs one of kto_tag and label, true or false")
    turns = _conversations(row) if "conversations" in row else read_messages(columns(row, "messages")[0], "messages")
    if not turns or turns[-1]["role"] != "assistant":
        raise Reject("no_final_answer", "the conversation does not end with the assistant's turn")
    return checked(Record(turns[:-1], (turns[-1:],), label=found[0]))


def alpaca(row: Row) -> Record:
    """Alpaca: `instruction` and `output`, and optionally `input`, `system` and `history`."""
    (output,) = text_columns(row, "output")
    return checked(Record(alpaca_prompt(row), ([assistant(output)],)))


def alpaca_prompt(row: Row) -> list[Message]:
    """Build the prompt of a row in one of the alpaca formats.

    `system` becomes the system message, the pairs of question and answer in `history` follow it, and `instruction`
    and `input` are the user's last turn.
    """
    (instruction,) = text_columns(row, "instruction")
    context = row.get("input") or ""
    if not isinstance(context, str):
        raise Reject(SHAPE, "input is not text")
    if not instruction.strip():
        raise Reject("empty_prompt")
    asked = f"{instruction}\n{context.strip()}" if context.strip() else instruction
    return [*system_turn(row.get("system")), *_history(row.get("history")), user(asked)]


def capybara_conversation(row: Row) -> Record:
    """Capybara: `conversation`, a list of `{"input", "output"}` turns; every output is trained on."""
    (turns,) = columns(row, "conversation")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("input"), str) and isinstance(turn.get("output"), str)
        for turn in turns
    ):
        raise Reject(SHAPE, "conversation is not a list of turns with input and output")
    return messages({"messages": [message for turn in turns for message in _turn(turn["input"], turn["output"])]})


def prompt_response(row: Row) -> Record:
    """A `prompt-completion` row under other names: exactly one column can be the prompt, and one the answer."""
    prompts, completions = ([name for name in names if name in row] for names in (PROMPTS, COMPLETIONS))
    if len(prompts) != 1 or len(completions) != 1:
        raise Reject(SHAPE, f"not one column each that can be the prompt ({prompts}) and the answer ({completions})")
    row = row | {"prompt": row[prompts[0]], "completion": row[completions[0]]}
    return prompt_completion(row)


def _conversations(row: Row) -> list[Message]:
    (turns,) = columns(row, "conversations")
    conversation = read_sharegpt(turns, "conversations")
    if conversation and conversation[0]["role"] == "system":
        return conversation
    return [*system_turn(row.get("system")), *conversation]


def _history(past: Any) -> list[Message]:
    past = past or []
    if not isinstance(past, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in past
    ):
        raise Reject("bad_history", "history is not a list of [question, answer]")
    return [message for asked, answered in past for message in _turn(asked, answered)]


def _turn(asked: str, answered: str) -> tuple[Message, Message]:
    return user(asked), assistant(answered)
