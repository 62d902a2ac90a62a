"""Messages of rows in a uniform shape: known roles, contents that are text, no nulls.

All functions here raise `Reject` for a row that cannot be used.
"""

import re
from typing import Any

from dpoctl.data.readers.json_lines import read_cell
from dpoctl.data.records import Message, Reject, Row, Text, squeeze

ROLES = ("system", "user", "assistant", "tool")
SHAPE = "wrong_shape"
"""The reason of a `Reject` for a row that is not in the format at all."""


PYTHON_LIST = re.compile(r"\s*\[\s*\{\s*'(?:role|content|from|value)'.*\}\s*\]\s*\Z", re.DOTALL)
"""A list of messages as data frames write it to CSV files."""


def read_text(value: Any, name: str) -> Text:
    """Read a string, or a list of messages."""
    if isinstance(value, str) and not PYTHON_LIST.match(value):
        return value
    if isinstance(value, str | list):
        return read_messages(value, name)
    raise Reject(SHAPE, f"{name} is {shape_of(value)}, not text or messages")


def read_messages(value: Any, name: str) -> list[Message]:
    """Read a list of messages with known roles; contents in parts of text are joined, and null keys dropped."""
    if isinstance(value, str) and PYTHON_LIST.match(value):
        raise Reject(SHAPE, f"{name} is a list as Python writes it, not JSON; write the column with json.dumps")
    if not isinstance(value, list):
        raise Reject(SHAPE, f"{name} is {shape_of(value)}, not a list of messages")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise Reject(SHAPE, f"{name}: message {number} is {shape_of(message)}, not one with role and content")
    return [_message(message, f"{name}, message {number}") for number, message in enumerate(value, start=1)]


def check_prompt(prompt: Text) -> None:
    """Reject a prompt that is empty, or whose last message is not the user's or a tool's."""
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise Reject("empty_prompt")
    if not isinstance(prompt, str) and prompt[-1]["role"] not in ("user", "tool"):
        raise Reject("roles_out_of_order", f"the prompt ends with the {prompt[-1]['role']}'s turn")


def check_answer(answer: Text, name: str) -> None:
    """Reject an answer without text of the assistant, or one that starts with another role."""
    if isinstance(answer, str):
        if not answer.strip():
            raise Reject("empty_answer", f"{name} is empty")
        return
    if answer and answer[0]["role"] != "assistant":
        raise Reject("roles_out_of_order", f"{name} starts with the {answer[0]['role']}'s turn")
    turns = [message for message in answer if message["role"] == "assistant"]
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in turns):
        raise Reject("empty_answer", f"{name} is empty")


def check_different(one: Text, other: Text) -> None:
    """Reject two answers that differ in white space only, or not at all."""
    if one == other:
        raise Reject("identical_answers")
    if squeeze(one) == squeeze(other):
        raise Reject("identical_answers", "they differ in white space only")


def until_user(messages: list[Message]) -> list[Message]:
    """Keep the messages before the next user turn."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return messages[: users[0]] if users else messages


def through_answer(messages: list[Message]) -> list[Message]:
    """Leave out the messages after the assistant's last turn."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: turns[-1] + 1] if turns else messages


def shared_turns(one: list[Any], other: list[Any]) -> int:
    """Count the first turns that two conversations share."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


def without_nulls(value: Any, keep: str = "") -> Any:
    """Drop null keys at any depth, except under one key: Arrow adds them where rows of a file have different keys."""
    if isinstance(value, dict):
        return {
            key: item if key == keep else without_nulls(item, keep) for key, item in value.items() if item is not None
        }
    if isinstance(value, list):
        return [without_nulls(item, keep) for item in value]
    return value


def is_from_arrow(row: Row) -> bool:
    """Return whether the messages of a row had to have the same keys: then a null may be no value of anybody's.

    JSON that Arrow wrote gives `tool_calls: null` to messages that call nothing.
    """
    lists = (value for value in row.values() if isinstance(value, list))
    messages = (message for value in lists for message in value if isinstance(message, dict))
    return any("tool_calls" in message and message["tool_calls"] is None for message in messages)


def _message(message: Message, where: str) -> Message:
    # A null that is still there is an argument that a call gave.
    message = without_nulls(message, keep="arguments")
    if isinstance(call := message.get("function_call"), dict) and not message.get("tool_calls"):
        # The key of earlier APIs, for one call.
        message = {key: value for key, value in message.items() if key != "function_call"}
        message["tool_calls"] = [{"type": "function", "function": call}]
    if not isinstance(message.get("role"), str):
        raise Reject(SHAPE, f"{where}: no role")
    role = "system" if message["role"] == "developer" else message["role"]
    if role not in ROLES:
        raise Reject("unknown_role", f"{where}: {role!r}")
    if "content" not in message and not message.get("tool_calls"):
        raise Reject("no_content", where)
    if isinstance(calls := message.get("tool_calls"), list):
        message |= {"tool_calls": [_call(call, where) for call in calls]}
    return message | {"role": role, "content": _content(message.get("content", ""), where)}


def _call(call: Any, where: str) -> Any:
    """Make the arguments of a call an object: APIs send JSON text, which a chat template would quote again."""
    function = call.get("function") if isinstance(call, dict) else None
    text = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(text, str) or not text.lstrip().startswith("{"):
        return call
    try:
        return call | {"function": function | {"arguments": read_cell(text, f"{where}: arguments", "not_json")}}
    except Reject as reject:
        if reject.reason != "not_json":
            raise
        return call


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Reject(SHAPE, f"{where}: content is {shape_of(content)}")
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise Reject(SHAPE, f"{where}: a part is {shape_of(part)}")
    text = part.get("text", part.get("value"))
    if part.get("type", "text") != "text" or not isinstance(text, str):
        raise Reject("not_text", f"{where}: a part of type {part.get('type')!r}; only text can be trained on")
    return text


def shape_of(value: Any) -> str:
    """Name the shape of a value in a row: null, a number, a list."""
    names = {"NoneType": "null", "str": "text", "bool": "true or false", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, "a number" if isinstance(value, int | float) else type(value).__name__)
