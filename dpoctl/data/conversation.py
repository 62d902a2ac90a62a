"""Messages as rows hold them, made uniform: known roles, contents that are text, no nulls."""

import json
from typing import Any

from dpoctl.data.records import Message, Reject, Text, squeeze

ROLES = ("system", "user", "assistant", "tool")
SHAPE = "wrong_shape"
"""The reason of a `Reject` that says: this row is not in this format at all."""


def read_text(value: Any, name: str) -> Text:
    """Read a string, or a list of messages.

    Raises:
        Reject: It is neither, or a message in it cannot be used.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return read_messages(value, name)
    raise Reject(SHAPE, f"{name} is {_kind(value)}, not text or messages")


def read_messages(value: Any, name: str) -> list[Message]:
    """Read a list of messages; text in parts is joined, null keys vanish.

    Raises:
        Reject: It is not a list of messages, a role is unknown, or a part is not text.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Reject(SHAPE, f"{name} is not a list of messages")
    return [_message(message, f"{name}, message {number}") for number, message in enumerate(value, start=1)]


def check_prompt(prompt: Text) -> None:
    """Make sure that an answer can follow.

    Raises:
        Reject: The prompt is empty, or its last message is not the user's or a tool's.
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise Reject("empty_prompt")
    if not isinstance(prompt, str) and prompt[-1]["role"] not in ("user", "tool"):
        raise Reject("roles_out_of_order", f"the prompt ends with the {prompt[-1]['role']}'s turn")


def check_answer(answer: Text, name: str) -> None:
    """Make sure that there is something to learn from.

    Raises:
        Reject: The answer holds no text of an assistant, or does not start with one.
    """
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
    """Make sure that there is something to prefer.

    Raises:
        Reject: Two answers differ in nothing but white space.
    """
    if one == other:
        raise Reject("identical_answers")
    if squeeze(one) == squeeze(other):
        raise Reject("identical_answers", "they differ in white space only")


def until_user(messages: list[Message]) -> list[Message]:
    """Keep the messages before the next user turn."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return messages[: users[0]] if users else messages


def through_answer(messages: list[Message]) -> list[Message]:
    """Leave out what follows the assistant's last turn."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: turns[-1] + 1] if turns else messages


def shared_turns(one: list[Any], other: list[Any]) -> int:
    """Count the leading turns that two conversations share."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


def without_nulls(value: Any) -> Any:
    """Drop null keys at any depth: Arrow fills them in where rows of a file differ."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _message(message: Message, where: str) -> Message:
    message = without_nulls(message)
    if not isinstance(message.get("role"), str):
        raise Reject(SHAPE, f"{where}: no role")
    role = "system" if message["role"] == "developer" else message["role"]
    if role not in ROLES:
        raise Reject("unknown_role", f"{where}: {role!r}")
    if "content" not in message and not message.get("tool_calls"):
        raise Reject("no_content", where)
    if isinstance(calls := message.get("tool_calls"), list):
        message |= {"tool_calls": [_call(call) for call in calls]}
    return message | {"role": role, "content": _content(message.get("content", ""), where)}


def _call(call: Any) -> Any:
    """Make the arguments of a call an object: APIs send JSON text, which a chat template would quote once more."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError:
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Reject(SHAPE, f"{where}: content is {_kind(content)}")
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise Reject(SHAPE, f"{where}: a part is {_kind(part)}")
    text = part.get("text", part.get("value"))
    if part.get("type", "text") != "text" or not isinstance(text, str):
        raise Reject("not_text", f"{where}: a part of type {part.get('type')!r}; only text can be trained on")
    return text


def _kind(value: Any) -> str:
    names = {"NoneType": "null", "bool": "true or false", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, "a number" if isinstance(value, int | float) else type(value).__name__)
