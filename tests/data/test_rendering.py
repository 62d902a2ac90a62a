import copy

import pytest

from dpoctl.data.prepare import prepare
from dpoctl.data.preview import decode_runs
from dpoctl.data.records import Record, Reject
from dpoctl.data.rendering import BREAK, Renderer
from dpoctl.errors import DataError, UsageError
from dpoctl.recipe.templates import NAMES, template_text

CHATML = template_text("chatml")
GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN3 = (
    "{%- set last = (messages | selectattr('role', 'equalto', 'assistant') | list | length) -%}"
    "{%- set seen = namespace(n=0) -%}"
    "{%- for m in messages -%}{%- set text = m.content -%}"
    "{%- if m.role == 'assistant' -%}{%- set seen.n = seen.n + 1 -%}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') -%}"
    "{%- if seen.n == last and not add_generation_prompt -%}{%- set text = '<think>\n\n</think>\n\n' + text -%}"
    "{%- endif -%}{%- endif -%}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{%- endfor -%}" + GENERATE
)
DEEPSEEK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NO_THINKING = DEEPSEEK.replace("<think>\n{% endif", "<think>\n\n</think>\n\n{% endif")
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)
GLM = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
MOVED = "{% for m in messages %}{{ loop.length }}:{{ m.content }}<|im_end|>{% endfor %}"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def render(tokenizer):
    def call(template, prompt, *responses, loss_on="assistant", special=(), row=None, **kwargs):
        mine = copy.deepcopy(tokenizer)
        mine.add_tokens(list(special), special_tokens=True)
        mine.chat_template = template
        return Renderer(mine, kwargs, loss_on).render(Record(prompt, tuple(responses), **row or {}))

    return call


def scored(completion):
    return [completion.text[start:end] for start, end in completion.spans]


def test_the_built_in_templates_end_turns_and_open_the_answer(tokenizer):
    expected = {
        "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "zephyr": "<|system|>\ns<|im_end|>\n<|user|>\nq<|im_end|>\n<|assistant|>\n",
        "llama3": "<|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "mistral": "[INST] s\n\nq [/INST]",
    }
    assert set(NAMES) == expected.keys()
    for name in NAMES:
        messages = [{"role": "system", "content": "s"}, user("q")]
        text = tokenizer.apply_chat_template(
            messages, chat_template=template_text(name), tokenize=False, add_generation_prompt=True
        )
        assert text == expected[name]


def test_a_template_that_does_not_exist_is_refused_with_the_names(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages }}")
    assert template_text(str(path)) == "{{ messages }}"
    with pytest.raises(UsageError, match="chatml, llama3, mistral, zephyr"):
        template_text("chatlm")


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("chatml", [" a <|im_end|>", "b<|im_end|>"]),
        ("zephyr", [" a <|im_end|>", "b<|im_end|>"]),
        ("llama3", ["a<|eot_id|>", "b<|eot_id|>"]),
        ("mistral", [" a<|im_end|>", " b<|im_end|>"]),
    ],
)
def test_an_answer_ends_with_its_end_of_turn_and_nothing_after(render, name, answers):
    rendered = render(template_text(name), [user("q")], [assistant(" a ")], [assistant("b")], special=["<|eot_id|>"])
    assert [completion.text for completion in rendered.completions] == answers
    assert not any(completion.needs_eos for completion in rendered.completions)
    assert rendered.notes == ()


def test_every_assistant_turn_is_scored_or_only_the_last(render):
    turns = [assistant("one"), user("two"), assistant("three"), user("four"), assistant("five")]
    for loss_on, expected in (("assistant", ["one", "three", "five"]), ("last", ["five"])):
        rendered = render(CHATML, [user("zero")], turns, loss_on=loss_on)
        assert scored(rendered.completions[0]) == [text + "<|im_end|>" for text in expected]
        assert rendered.completions[0].text.startswith("one<|im_end|>\n<|im_start|>user\ntwo")


def test_a_turn_with_weight_zero_is_context(render):
    turns = [assistant("one") | {"weight": 0}, user("two"), assistant("three")]
    assert scored(render(CHATML, [user("q")], turns).completions[0]) == ["three<|im_end|>"]
    with pytest.raises(Reject):
        render(CHATML, [user("q")], turns[:1])


def test_repeated_words_do_not_confuse_the_spans(render):
    turns = [assistant("yes"), user("yes"), assistant("yes"), user("yes"), assistant("yes")]
    assert scored(render(QWEN3, [user("yes")], turns).completions[0])[:2] == ["yes<|im_end|>"] * 2
    assert scored(render(CHATML, [user("yes")], turns).completions[0]) == ["yes<|im_end|>"] * 3


def test_history_that_the_template_rewrites_is_found_and_noted(render):
    turns = [assistant("<think>hm</think>\none"), user("two"), assistant("three")]
    rendered = render(QWEN3, [user("q")], turns)
    assert scored(rendered.completions[0]) == ["one<|im_end|>", "<think>\n\n</think>\n\nthree<|im_end|>"]
    assert rendered.notes == ("history_rewritten", "thinking_dropped", "thinking_empty")


def test_a_thinking_stub_of_the_generation_prompt_is_part_of_the_prompt(render):
    for template, stub in ((DEEPSEEK, "<think>\n"), (NO_THINKING, "<think>\n\n</think>\n\n")):
        rendered = render(template, [user("q")], [assistant("a")])
        assert rendered.prompt.endswith(f"<|im_start|>assistant\n{stub}")
        assert rendered.completions[0].text == "a<|im_end|>"
        assert rendered.notes == ("thinking_stub",)


def test_a_system_message_that_vanishes_is_kept_as_generation_sees_it(render):
    prompt = [{"role": "system", "content": "be kind"}, user("q")]
    rendered = render(MISTRAL, prompt, [assistant("a")])
    assert rendered.prompt == "[INST] be kind\n\nq[/INST]"
    assert rendered.completions[0].text == " a<|im_end|>"
    assert rendered.notes == ("system_dropped",)


def test_text_after_the_end_of_turn_is_not_scored(render):
    turns = [assistant("one"), user("two"), assistant("three")]
    assert scored(render(PHI3, [user("q")], turns).completions[0]) == ["one<|im_end|>", "three<|im_end|>"]


def test_a_template_without_a_stop_token_gets_one_after_the_content(render):
    completion = render(GLM, [user("q")], [assistant("a ")]).completions[0]
    assert (completion.text, completion.spans, completion.needs_eos) == ("a ", ((0, 2),), True)


def test_a_prompt_that_the_template_rewrites_is_one_rejected_row_with_both_texts(render):
    with pytest.raises(Reject, match=r"prompt_moved.*'1:q.*' becomes '2:q"):
        render(MOVED, [user("q")], [assistant("a")])


def test_a_conversation_that_the_template_refuses_is_one_rejected_row(render):
    template = "{{ raise_exception('no system role') if messages[0].role == 'system' }}" + CHATML
    assert render(template, [user("q")], [assistant("a")])
    with pytest.raises(Reject, match=r"no system role; .* put its text before the first user's"):
        render(template, [{"role": "system", "content": "s"}, user("q")], [assistant("a")])


def test_messages_without_a_template_are_refused_with_what_to_set(render):
    with pytest.raises(DataError, match=r"model\.chat_template"):
        render(None, [user("q")], [assistant("a")])


def test_plain_text_needs_no_template_and_ends_once(render):
    rendered = render(None, "q", " a", " b<|im_end|>\n<|im_end|>")
    assert [(completion.text, completion.needs_eos) for completion in rendered.completions] == [
        (" a", True),
        (" b", True),
    ]


def test_an_end_of_turn_written_into_an_answer_is_not_doubled(render):
    assert render(CHATML, [user("q")], [assistant("a<|im_end|>\n")]).completions[0].text == "a<|im_end|>"


def test_control_strings_in_a_question_are_broken_and_those_of_the_template_are_not(render):
    rendered = render(CHATML, [user("say <|im_end|>")], [assistant("<think>no</think> <|im_end|> x")])
    assert rendered.prompt.replace(BREAK, "").count("<|im_end|>") == 2
    assert rendered.prompt.count("<|im_end|>") == 1
    assert rendered.completions[0].text == f"<think>no</think> <{BREAK}|im_end|> x<|im_end|>"


def test_todays_date_is_the_same_every_day(render):
    template = "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y-%m-%d\") }} " + CHATML
    assert render(template, [user("q")], [assistant("a")]).prompt.startswith("26 Jul 2024 2024-07-26<|im_start|>")


def test_template_variables_reach_the_template(render):
    template = "{% if shout %}{{ 'HEY ' }}{% endif %}" + CHATML
    assert render(template, [user("q")], [assistant("a")], shout=True).prompt.startswith("HEY ")


def test_an_end_of_sequence_right_behind_the_end_of_turn_belongs_to_it(render):
    template = CHATML.replace("<|im_end|>", "<|eot|><|im_end|>")
    completion = render(template, [user("q")], [assistant("a")], special=["<|eot|>"]).completions[0]
    assert (completion.text, completion.needs_eos) == ("a<|eot|><|im_end|>", False)


def test_an_earlier_turn_that_ends_otherwise_is_found_by_what_stands_before_its_end(render):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}to user: {{ m.content }}"
        "{{ '<|im_end|>' if loop.last else '<|endoftext|>' }}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [assistant("one"), user("two"), assistant("three")]
    rendered = render(template, [user("q")], turns)
    assert scored(rendered.completions[0]) == ["to user: one<|endoftext|>", "to user: three<|im_end|>"]
    assert rendered.notes == ("history_rewritten",)


def test_an_answer_or_a_question_that_the_template_changes_is_refused(render):
    upper = "message['content'] | upper if message['role'] == '{}' else message['content']"
    for role, reason in (("user", "prompt_rewritten"), ("assistant", "answer_rewritten")):
        template = CHATML.replace("message['content']", f"({upper.format(role)})")
        with pytest.raises(Reject, match=reason):
            render(template, [user("q")], [assistant("a")])


def test_thinking_that_the_template_leaves_out_or_opens_twice_is_noted(render):
    thought = [assistant("<think>hm</think>\na")]
    assert render(DEEPSEEK, [user("q")], thought).notes == ("thinking_dropped", "thinking_stub")
    twice = CHATML.replace(
        "message['content']", "('</think>' if message['role'] == 'assistant' else '') + message['content']"
    )
    assert render(twice, [user("q")], thought).notes == ("thinking_doubled",)


def test_thinking_after_a_prompt_that_ends_it_is_refused_with_the_setting(render):
    template = NO_THINKING.replace(".split('</think>')[-1]", "")
    with pytest.raises(Reject, match="enable_thinking: true"):
        render(template, [user("q")], [assistant("<think>hm</think>a")])


def test_a_template_that_reads_parts_alone_gets_parts(render):
    template = CHATML.replace("message['content']", "message['content'][0]['text']")
    rendered = render(template, [user("q")], [assistant("a")])
    assert rendered.prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.completions[0].text == "a<|im_end|>"


TOOL = {"type": "function", "function": {"name": "add", "description": "<|im_end|>", "parameters": {}}}


def test_tools_and_variables_of_a_row_reach_the_template(render):
    template = "{% if tools %}{{ tools[0].function.name + size }}{% endif %}" + CHATML
    row = {"tools": [TOOL], "template_kwargs": {"size": " small"}}
    rendered = render(template, [user("q")], [assistant("a")], row=row, size=" large")
    assert rendered.prompt.startswith("add small<|im_start|>")
    assert rendered.notes == ()


def test_system_messages_that_are_not_written_are_noted(render):
    users = "{% for m in messages if m.role != 'system' %}[{{ m.content }}]<|im_end|>{% endfor %}"
    prompt = [{"role": "system", "content": "be kind"}, user("q")]
    assert render(users, prompt, [assistant("a")]).notes == ("system_ignored",)


def test_control_strings_are_broken_wherever_the_template_may_write_them(render):
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": "<|im_end|>"}}}
    template = (
        "{% for t in tools or [] %}{{ t.function.description }}{% endfor %}"
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}<|im_end|>{% endfor %}"
    )
    rendered = render(template, [user("q")], [assistant("") | {"tool_calls": [call]}], row={"tools": [TOOL]})
    assert rendered.prompt.count("<|im_end|>") == rendered.completions[0].text.count("<|im_end|>") == 1


def test_rows_with_control_strings_are_noted(render):
    assert render(CHATML, [user("say <|im_end|>")], [assistant("a")]).notes == ("control_tokens",)
    assert render(CHATML, [user("q")], [assistant("a<|im_end|>")]).notes == ()


def test_variables_that_every_template_has_are_refused(render):
    with pytest.raises(UsageError, match="messages cannot be set"):
        render(CHATML, [user("q")], [assistant("a")], messages=[])
    with pytest.raises(Reject, match="template_variables"):
        render(CHATML, [user("q")], [assistant("a")], row={"template_kwargs": {"tools": []}})


def test_what_is_no_template_is_refused_with_its_line(render):
    with pytest.raises(DataError, match="not valid Jinja: line 2"):
        render("\n{% for %}", [user("q")], [assistant("a")])


def test_a_template_that_fails_in_its_own_way_is_one_rejected_row(render):
    with pytest.raises(Reject, match="template_refuses"):
        render("{{ 1 // (messages | length - 2) }}" + CHATML, [user("q")], [assistant("a")])


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("last", [["bye<|im_end|>"], ["sorry<|im_end|>"]]),
        ("assistant", [["good<|im_end|>", "bye<|im_end|>"], ["bad<|im_end|>", "sorry<|im_end|>"]]),
    ],
)
def test_conversations_that_part_in_the_middle_are_judged_by_the_turns_that_the_recipe_names(
    make_recipe, write_rows, tokenizer, tmp_path, loss_on, expected
):
    before = [user("q"), assistant("a"), user("more")]
    row = {
        "chosen": [*before, assistant("good"), user("thanks"), assistant("bye")],
        "rejected": [*before, assistant("bad"), user("no"), assistant("sorry")],
    }
    recipe = make_recipe(train=[write_rows([row])])
    recipe = recipe.model_copy(update={"dpo": recipe.dpo.model_copy(update={"loss_on": loss_on})})
    store = prepare(recipe, tokenizer, cache_dir=tmp_path / "cache").train
    assert store.texts(0).prompt == before
    example = store.example(0)
    found = []
    for suffix, flags in zip(example.suffixes, example.suffixes_scored, strict=True):
        ids, scored = [*example.shared, *suffix], [*example.shared_scored, *flags]
        found.append([run.text for run in decode_runs(tokenizer, ids, scored) if run.kind])
    assert found == expected
