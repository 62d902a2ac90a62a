from collections import Counter

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpoctl.data.gaps import GapFinder, GapTally
from dpoctl.data.records import Record
from dpoctl.data.tokenize import TRAINED, Answer, Encoder, build_example


def word_level():
    words = ["[UNK]", "</s>", "<0xC3>", "<0xA9>", "<0x0A>", *"abc"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="</s>")


def gaps_of(tokenizer, prompt, *answers, ids=None):
    encoder = Encoder(tokenizer)
    rows = [Answer(encoder.plain(answer), TRAINED * len(encoder.plain(answer))) for answer in answers]
    record = Record(prompt, answers)
    example = build_example(ids or encoder.plain(prompt), rows, record, np.uint16)
    return GapFinder(encoder).find(example, record)


def test_unknown_tokens_are_counted_with_the_characters_that_were_lost():
    gaps = gaps_of(word_level(), "a\u00fcb", "b\u00fc\u6f22", "c")
    assert gaps.unknown == 3
    assert gaps.characters == Counter({"\u00fc": 2, "\u6f22": 1})
    assert gaps.in_bytes == 0


def test_bytes_of_characters_are_counted_apart_and_a_line_feed_is_none():
    gaps = gaps_of(word_level(), "a", "b", "c", ids=[5, 2, 3, 4])
    assert (gaps.unknown, gaps.in_bytes) == (0, 2)


def test_a_tokenizer_of_bytes_has_no_gaps(tokenizer):
    assert not gaps_of(tokenizer, "\u6f22\u00fc", "\U0001f642", "b")


def test_a_store_reports_its_most_frequent_losses():
    tally = GapTally()
    for number in range(30):
        lost = chr(0x4E00 + number)
        tally.count(gaps_of(word_level(), "a", lost * (number + 1), "b"))
    tally.count(gaps_of(word_level(), "a", "b", "c"))
    report = tally.report()
    assert (report["rows_unknown"], report["unknown"], report["rows_in_bytes"]) == (30, 465, 0)
    assert list(report["characters"].values()) == list(range(30, 10, -1))
