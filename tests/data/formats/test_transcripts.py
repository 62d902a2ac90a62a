import pytest
from chat_samples import assistant, system, user

from dpoctl.data.formats.transcripts import as_messages, with_messages
from dpoctl.data.records import Record, Reject

TWO = [user("q1"), assistant("a1"), user("q2")]


def pair(prompt, chosen, rejected="no"):
    return Record(prompt, (chosen, rejected), ((0, 1),))


@pytest.mark.parametrize(
    ("prompt", "chosen", "messages"),
    [
        ("\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:", " a2", TWO),
        ("Human: q1\nAssistant: a1\nHuman: q2\nAssistant: ", "a2", TWO),
        ("User: q1\n\nAssistant: a1\n\nUser: q2", "\n\nAssistant: a2", TWO),
        ("User: q1\nAssistant: a1\n\nUser: q2\nAssistant:", " a2 ", TWO),
        ("### Human: q1### Assistant: a1### Human: q2### Assistant:", " a2", TWO),
        ("USER: q1 ASSISTANT: a1 USER: q2 ASSISTANT:", " a2", TWO),
        ("System: be\nbrief\n\nHuman: q\n\nAssistant:", " a2", [system("be\nbrief"), user("q")]),
        ("\n\nHuman: say this:\nUser: hi\n\nAssistant:", " a2", [user("say this:\nUser: hi")]),
    ],
)
def test_a_transcript_becomes_one_message_a_turn(prompt, chosen, messages):
    record = with_messages(pair(prompt, chosen))
    assert record == pair(messages, [assistant("a2")], [assistant("no")])


def test_an_answer_of_several_turns_is_several_messages():
    record = with_messages(pair("\n\nHuman: q\n\nAssistant:", " a\n\nHuman: more\n\nAssistant: b"))
    assert record.responses[0] == [assistant("a"), user("more"), assistant("b")]


def test_a_text_row_is_a_conversation_through_its_last_answer():
    record = with_messages(Record("", ("### Human: q\n### Assistant: a\n### Human: bye",)))
    assert (record.prompt, record.responses) == ([user("q")], ([assistant("a")],))


def test_a_transcript_that_its_format_wrapped_in_one_message_is_read_too():
    prompt = [system("s"), user("Human: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:")]
    record = with_messages(pair(prompt, [assistant("a2")], [assistant("no")]))
    assert record == pair([system("s"), *TWO], [assistant("a2")], [assistant("no")])


@pytest.mark.parametrize(
    ("prompt", "chosen"),
    [
        ("What is the Assistant: a person?", "no"),
        ("SUBREDDIT: r/x\n\nPOST: y\n\nTL;DR:", " z"),
        ("User: root logged in. Is that safe?", "It depends."),
        ([user("User: root logged in")], [assistant("x")]),
    ],
)
def test_other_texts_are_left_alone(prompt, chosen):
    assert with_messages(Record(prompt, (chosen,))) is None


@pytest.mark.parametrize(
    ("prompt", "chosen", "reason", "detail"),
    [
        ("\n\nHuman: q\n\nAssistant: Human: r\n\nAssistant:", " a", "empty_turn", "turn 2"),
        ("\n\nHuman: q\n\nHuman: r\n\nAssistant:", " a", "unclear_turns", "turns 1 and 2 are both of the user"),
        ("\n\nHuman: q\n\nAssistant:", " a\n\nHuman: r", "no_final_answer", "user"),
        ("\n\nHuman: q\n\nAssistant:", " a.  Human: r Assistant: b", "unclear_turns", "one may be quoted"),
        ("\n\nHuman: q\n\nAssistant: Sure,", " a", "unclear_turns", "within a turn"),
        ("Be brief.\n\nHuman: q\n\nAssistant:", " a", "unclear_turns", "does not start with the user's"),
        ("\n\nHuman: \n\nAssistant:", " a", "empty_turn", "turn 1"),
    ],
)
def test_a_transcript_that_cannot_be_read_whole_is_rejected_with_its_reason(prompt, chosen, reason, detail):
    with pytest.raises(Reject) as rejected:
        with_messages(pair(prompt, chosen))
    assert rejected.value.reason == reason
    assert detail in rejected.value.detail


def test_text_without_turns_is_a_question_and_its_answers():
    record = as_messages(pair("Is tea good?\n", " Yes. ", "No."))
    assert record == pair([user("Is tea good?")], [assistant("Yes.")], [assistant("No.")])
    assert as_messages(record) is record
    with pytest.raises(Reject) as rejected:
        as_messages(Record("", ("Tea is a drink.",)))
    assert rejected.value.reason == "no_turns"
