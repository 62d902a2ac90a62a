import copy
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpoctl.data.build import MOST_SLOW, RecordEncoder, UnknownTokenFinder, UnknownTokens
from dpoctl.data.records import Record, Reject
from dpoctl.data.rendering import Renderer
from dpoctl.data.tokenize import TRAINED, Answer, Encoder, Limits, build_example
from dpoctl.errors import DataError


def word_level():
    words = ["[UNK]", "</s>", "<0xC3>", "<0xA9>", "<0x0A>", *"abc"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="</s>")


def unknown_tokens(tokenizer, prompt, *answers, ids=None):
    encoder = Encoder(tokenizer)
    rows = [Answer(encoder.plain(answer), TRAINED * len(encoder.plain(answer))) for answer in answers]
    record = Record(prompt, answers)
    example = build_example(ids or encoder.plain(prompt), rows, record, np.uint16)
    return UnknownTokenFinder(encoder).find(example, record)


def test_unknown_tokens_are_counted_with_the_characters_that_were_lost():
    found = unknown_tokens(word_level(), "a\u00fcb", "b\u00fc\u6f22", "c")
    assert found.unknown == 3
    assert found.characters == Counter({"\u00fc": 2, "\u6f22": 1})
    assert found.in_bytes == 0


def test_bytes_of_characters_are_counted_apart_and_a_line_feed_is_none():
    found = unknown_tokens(word_level(), "a", "b", "c", ids=[5, 2, 3, 4])
    assert (found.unknown, found.in_bytes) == (0, 2)


def test_a_tokenizer_of_bytes_knows_every_character(tokenizer):
    assert not unknown_tokens(tokenizer, "\u6f22\u00fc", "\U0001f642", "b")


def test_a_store_reports_its_most_frequent_losses():
    total = UnknownTokens()
    for number in range(30):
        lost = chr(0x4E00 + number)
        total.add(unknown_tokens(word_level(), "a", lost * (number + 1), "b"))
    assert unknown_tokens(word_level(), "a", "b", "c") is None
    report = total.report()
    assert (report["rows_unknown"], report["unknown"], report["rows_in_bytes"]) == (30, 465, 0)
    assert list(report["characters"].values()) == list(range(30, 10, -1))


def test_a_row_for_which_the_template_takes_too_long_is_rejected_and_several_end_the_run(tokenizer, monkeypatch):
    monkeypatch.setattr("dpoctl.data.chat_template.RENDER_SECONDS", 0.2)
    mine = copy.deepcopy(tokenizer)
    slow = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    mine.chat_template = f"{{% if 'slow' in messages[0].content %}}{slow}{{% endif %}}{mine.chat_template}"
    encoder = RecordEncoder(Renderer(mine, {}), Encoder(mine), [Limits(512, None, False, False)])

    def records(*questions):
        answer = [{"role": "assistant", "content": "yes"}]
        return [Record([{"role": "user", "content": question}], (answer,)) for question in questions]

    one, other = encoder.encode(records("slow", "quick"), [0, 0])
    assert isinstance(one, Reject)
    assert one.reason == "template_too_slow"
    assert not isinstance(other, Reject)
    with pytest.raises(DataError, match=r"took more than 0\.2 s"):
        encoder.encode(records(*["slow"] * MOST_SLOW), [0] * MOST_SLOW)
