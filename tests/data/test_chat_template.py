"""Chat templates are programs from unknown authors: their time, size and reach are bounded."""

import threading
import time

import pytest
from chat_samples import user
from conftest import CHATML

from dpoctl.data import chat_template
from dpoctl.data.chat_template import LONGEST_RECORD, ChatTemplate, refuse_too_long, time_limit
from dpoctl.data.records import Record, Reject
from dpoctl.errors import DataError

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def rendered(tokenizer, template: str, content: str = "hello", tools=()) -> str:
    tokenizer.chat_template = template
    try:
        record = Record([user(content)], (), tools=[*tools])
        return ChatTemplate(tokenizer, {}).apply([user(content)], generate=True, record=record)
    finally:
        tokenizer.chat_template = CHATML


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_stopped(tokenizer, monkeypatch):
    monkeypatch.setattr("dpoctl.data.chat_template.RENDER_SECONDS", 0.3)
    began = time.process_time()
    with pytest.raises(DataError, match=r"took more than 0\.3 s for one conversation; set model\.chat_template"):
        rendered(tokenizer, LOOPS)
    assert time.process_time() - began < 5


GREEDY = {
    "a text of two thousand million letters": "{{ 'a' * 2000000000 }}",
    "the same the other way round": "{{ 2000000000 * 'a' }}",
    "a list": "{{ ([1] * 2000000000) | length }}",
    "a number of a thousand million digits": "{{ 10 ** 1000000000 }}",
    "a text out of proportion": "{% for a in range(3000) %}{{ 'a' * 1000 }}{% endfor %}",
    "a change of the messages": "{{ messages.append(1) }}",
    "a namespace's dunder": "{% set n = namespace(__init__=1) %}",
}


@pytest.mark.parametrize("tools", [[], [TOOL]], ids=["plain", "tools"])
@pytest.mark.parametrize("what", GREEDY)
def test_a_template_that_takes_too_much_is_refused_at_once(tokenizer, what, tools):
    began = time.process_time()
    with pytest.raises((Reject, DataError)):
        rendered(tokenizer, GREEDY[what], tools=tools)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ '' | attr('__class__') }}"])
def test_a_template_sees_no_class(tokenizer, template):
    try:
        text = rendered(tokenizer, template)
    except Reject:
        return
    assert text == ""


def test_a_template_of_a_megabyte_is_not_compiled(tokenizer):
    with pytest.raises(DataError, match="characters; the limit is 1,048,576"):
        rendered(tokenizer, "a" * (chat_template.LONGEST_TEMPLATE + 1))


def test_multiplication_within_bounds_is_what_it_is(tokenizer):
    assert rendered(tokenizer, "{{ 'ab' * 3 }}{{ 6 * 7 }}{{ 2 ** 10 }}{{ 2.5 * 2 }}") == "ababab4210245.0"


def test_a_thread_is_not_limited_and_works(tokenizer):
    found = []
    thread = threading.Thread(target=lambda: found.append(rendered(tokenizer, "{{ messages[0].content }}")))
    thread.start()
    thread.join()
    assert found == ["hello"]


def test_time_within_the_limit_leaves_no_alarm_behind():
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_a_record_of_ten_megabytes_is_refused_before_it_is_tokenized():
    refuse_too_long(Record("a" * (LONGEST_RECORD - 1), ("b",)))
    with pytest.raises(Reject, match="characters") as refused:
        refuse_too_long(Record([user("a" * 10_000_000)], ([user("b")],)))
    assert refused.value.reason == "too_long"


def test_what_is_no_python_once_it_is_translated_is_no_template(tokenizer):
    with pytest.raises(DataError, match=r"the chat template is not valid Jinja: 'break' outside loop"):
        rendered(tokenizer, "{% break %}")
