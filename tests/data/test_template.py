import copy

import pytest

from dpoctl.data.records import Record, Reject
from dpoctl.data.template import BREAK, Renderer
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
    def call(template, prompt, *responses, loss_on="assistant", **kwargs):
        mine = copy.deepcopy(tokenizer)
        mine.chat_template = template
        return Renderer(mine, kwargs, loss_on).render(Record(prompt, tuple(responses)))

    return call


def scored(completion):
    return [completion.text[start:end] for start, end in completion.spans]


def test_the_built_in_templates_end_turns_and_open_the_answer(tokenizer):
    assert set(NAMES) == {"chatml", "zephyr"}
    expected = {
        "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "zephyr": "<|system|>\ns<|im_end|>\n<|user|>\nq<|im_end|>\n<|assistant|>\n",
    }
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
    with pytest.raises(UsageError, match="chatml, zephyr"):
        template_text("chatlm")


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_ends_with_its_end_of_turn_and_nothing_after(render, name):
    rendered = render(template_text(name), [user("q")], [assistant(" a ")], [assistant("b")])
    assert [completion.text for completion in rendered.completions] == [" a <|im_end|>", "b<|im_end|>"]
    assert not any(completion.needs_eos for completion in rendered.completions)
    assert rendered.prompt.endswith("assistant|>\n" if name == "zephyr" else "assistant\n")
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
    assert rendered.notes == ("history_rewritten",)


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


def test_an_unknown_divergence_stops_with_both_texts(render):
    with pytest.raises(DataError, match=r"'1:q.*' against '2:q"):
        render(MOVED, [user("q")], [assistant("a")])


def test_a_conversation_that_the_template_refuses_is_one_rejected_row(render):
    template = "{{ raise_exception('no system role') if messages[0].role == 'system' }}" + CHATML
    assert render(template, [user("q")], [assistant("a")])
    with pytest.raises(Reject, match="no system role"):
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
