"""Every chat template with every shape of conversation: a turn is trained on whole, or its row says what is missing."""

import pytest
from template_sweep import FILES, SHAPES, Case, cells, symbol

SAYS = {
    "call": ("tool_calls",),
    "text and call": ("tool_calls", "content beside tool_calls", "tools"),
    "two calls": ("tool_calls", "tool-calls", "tools"),
    "tool turns": ("tool_calls", "tools"),
    "null content": ("tool_calls", "the tool's turn", "must alternate", "must take turns", "roles", "the prompt"),
    "reasoning": ("enable_thinking",),
    "system": ("system",),
    "name": ("name",),
    "two users": ("must alternate", "must take turns"),
    "empty": ("empty",),
}
"""What the rejection of a shape names; shapes that are not here are never rejected."""


WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("name", FILES)
def test_a_turn_is_trained_on_whole_or_its_row_rejected_by_the_name_of_the_field(name: str, special: bool) -> None:
    case = Case(FILES[name].stem, FILES[name].read_text(encoding="utf-8"), special=special)
    for shape, kind, loss_on, outcome in cells(case):
        is_named = any(word in outcome for word in SAYS.get(shape, ()))
        assert outcome.startswith("trained") or (is_named and "WRONG" not in outcome), (shape, kind, loss_on, outcome)


def test_every_cell_of_a_template_that_knows_tools_is_trained_on() -> None:
    case = Case("chatml", WITH_TOOLS)
    found = {shape: symbol(outcome) for shape, _, on, outcome in cells(case) if on == "last"}
    assert {shape for shape in SHAPES if found[shape] != "+"} == {"name", "empty"}
