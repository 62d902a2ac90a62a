"""A prompt that is cut, and its answers: the ids are those of the whole text."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chat_samples import OWN, build_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpoctl.data.formats import read
from dpoctl.data.readers import read_file
from dpoctl.data.records import Reject
from dpoctl.data.rendering import BREAK, Completion, Rendered
from dpoctl.data.tokenize import Encoder
from dpoctl.data.word_cache import LEAD, SIGN, PromptEnd

LLAMA = Path(__file__).parents[3] / "shared" / "data" / "llama-tokenizer"
WORDS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters=BREAK), max_size=6),
    st.sampled_from([" ", "  ", "   ", SIGN, "\n", "\n\n", "\t", "\xa0", "a", "x", " the", "ing", ".", "漢字", "é"]),
    st.sampled_from(["\U0001f642", "\U0001f9d1\u200d\U0001f680", "e\u0301", "</s>", "<s>", "<unk>", "<0x0A>"]),
)
TEXT = st.lists(WORDS, min_size=1, max_size=8).map("".join)
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def small(pre_tokenizer: Any = None, normalizer: Any = None, *, extra: tuple[str, ...] = (), **options: Any) -> Encoder:
    """A SentencePiece-like tokenizer of a few merges, which spells everything else in bytes."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [SIGN, *"abhtinegx\n", SIGN * 2, SIGN * 4, "th", "the", "in", "ing", SIGN + "t", SIGN + "the", *extra]
    merges = [(SIGN, SIGN), (SIGN * 2, SIGN * 2), ("t", "h"), (SIGN, "t"), ("th", "e"), ("i", "n"), ("in", "g")]
    merges += [(SIGN, "the"), *((token[0], token[1:]) for token in extra if len(token) > 1)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, **({"byte_fallback": True} | options)))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


def metaspace(**options: Any) -> Any:
    return pre_tokenizers.Metaspace(**({"split": False} | options))


def spelled(*steps: Any) -> Any:
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SIGN)])


KINDS = {
    "metaspace": lambda: small(metaspace()),
    "metaspace that prepends nothing": lambda: small(metaspace(prepend_scheme="never")),
    "metaspace at the start": lambda: small(metaspace(prepend_scheme="first")),
    "normalizer": lambda: small(normalizer=spelled(normalizers.Prepend(SIGN))),
    "normalizer that prepends nothing": lambda: small(normalizer=spelled()),
    "unknown characters": lambda: small(metaspace(), extra=("?",), byte_fallback=False, unk_token="?", fuse_unk=True),
}


@cache
def encoder_of(kind: str) -> Encoder:
    if kind == "llama":
        return Encoder(AutoTokenizer.from_pretrained(LLAMA))
    return KINDS[kind]()


def whole(encoder: Encoder, rendered: Rendered) -> list[Any]:
    """Encode without cutting any prompt."""
    uncut = copy.copy(encoder)
    uncut.__dict__["prompt_ends"] = type(
        "Uncut", (), {"of": lambda _, prompt: PromptEnd(prompt), "ids": lambda _, end, ids: ids}
    )()
    return uncut.encode([rendered])


def plain(prompt: str, *answers: str) -> Rendered:
    return Rendered(prompt, tuple(Completion(text, ((0, len(text)),), needs_eos=True) for text in answers))


@pytest.mark.parametrize("kind", [*KINDS, "llama"])
@given(prompt=TEXT, answers=st.lists(TEXT, min_size=1, max_size=3))
@SETTINGS
def test_a_cut_prompt_leaves_the_ids_as_they_are(kind: str, prompt: str, answers: list[str]) -> None:
    if kind == "llama" and not LLAMA.is_dir():
        pytest.skip("the real tokenizer is not here")
    encoder = encoder_of(kind)
    rendered = plain(prompt, *answers)
    assert encoder.prompt_ends._words
    assert encoder.encode([rendered]) == whole(encoder, rendered)


@pytest.mark.parametrize("kind", [*KINDS, "llama"])
@given(texts=st.lists(TEXT, max_size=5))
@SETTINGS
def test_texts_have_the_ids_that_the_tokenizer_gives_them_whole(kind: str, texts: list[str]) -> None:
    if kind == "llama" and not LLAMA.is_dir():
        pytest.skip("the real tokenizer is not here")
    encoder = encoder_of(kind)
    words = encoder._words
    assert words is not None
    alone = [encoder._backend.encode(text, add_special_tokens=False).ids for text in texts]
    assert words.encode(texts) == alone


def test_real_transcripts_have_the_ids_of_the_whole_text(hh_file: Path) -> None:
    encoder = encoder_of("llama")
    cut = 0
    for _, row in read_file(hh_file):
        assert isinstance(row, dict)
        try:
            record = read("hh", row)
        except Reject:
            continue
        rendered = plain(str(record.prompt), *map(str, record.responses))
        cut += len(encoder.prompt_ends.of(rendered.prompt).text) < 60
        assert encoder.encode([rendered]) == whole(encoder, rendered)
    assert cut > 1400


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one two", "x two"),
        ("one  \u2581two\n\nA:", "x  \u2581two\n\nA:"),
        ("one ", "x "),
        ("one", "one"),
        ("  one", "  one"),
        ("one</s> two", "</s> two"),
        ("one two</s>", "</s>"),
        ("one</s>two three", "x three"),
    ],
)
def test_a_prompt_is_cut_before_its_last_blanks_unless_an_added_token_is_near(prompt: str, expected: str) -> None:
    assert encoder_of("metaspace").prompt_ends.of(prompt).text == expected


@pytest.mark.parametrize(
    "encoder",
    [
        lambda: small(metaspace(), extra=("e" + SIGN,)),
        lambda: small(metaspace(), byte_fallback=False),
        lambda: small(metaspace(), ignore_merges=True),
        lambda: small(metaspace(), dropout=0.1),
        lambda: small(metaspace(replacement="_")),
        lambda: small(metaspace(split=True)),
        lambda: small(pre_tokenizers.Whitespace()),
        lambda: small(normalizer=normalizers.NFKC()),
        lambda: small(normalizer=spelled(normalizers.NFKC())),
        lambda: small(),
        lambda: with_added(AddedToken("<a b>", normalized=False)),
        lambda: with_added(AddedToken("<a>", normalized=True)),
        lambda: with_added(AddedToken("<a>", normalized=False, lstrip=True)),
        lambda: with_added(AddedToken(LEAD, normalized=False)),
    ],
)
def test_a_tokenizer_that_might_join_a_blank_to_what_stands_before_is_not_trusted(encoder: Any) -> None:
    assert encoder().prompt_ends.of("one two") == PromptEnd("one two")


def with_added(token: AddedToken) -> Encoder:
    encoder = small(metaspace())
    encoder._backend.add_tokens([token])
    return encoder


@pytest.fixture(scope="module")
def chatml() -> Any:
    return build_tokenizer("chatml", (OWN / "chatml.jinja").read_text(encoding="utf-8"))


@pytest.mark.parametrize("tail", ["<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>", "no control token"])
def test_only_what_follows_the_last_control_token_is_tokenized_again(chatml: Any, tail: str) -> None:
    text, anchor, _ = Encoder(chatml).prompt_ends.of("hello <|im_start|>user\nworld" + tail)
    expected = tail if tail.startswith("<") else "<|im_start|>user\nworldno control token"
    assert text == expected
    assert chatml.convert_ids_to_tokens(anchor) == expected.partition("|>")[0] + "|>"


def test_a_token_that_may_be_part_of_another_is_no_place_to_cut(chatml: Any) -> None:
    mine = copy.deepcopy(chatml)
    mine.add_tokens(["<|im_end|>>", "x<|"], special_tokens=True)
    mine.chat_template = str(mine.chat_template) + "<|im_end|>> x<|"
    assert Encoder(mine).prompt_ends.anchors.keys() == {"<bos>"}
    assert Encoder(chatml).prompt_ends.anchors.keys() == {"<bos>", "<|im_start|>", "<|im_end|>"}
