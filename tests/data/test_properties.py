"""Random conversations in any script: the answer is in its span, the prompt is the same for all, and turns end once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chat_samples import OWN, assistant, build_tokenizer, system, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dpoctl.data.records import Record, Reject
from dpoctl.data.rendering import BREAK, Renderer
from dpoctl.data.tokenize import Encoder
from dpoctl.errors import DataError
from dpoctl.recipe.templates import NAMES, template_text

LLAMA = Path(__file__).parents[3] / "shared" / "data" / "llama-tokenizer"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(OWN.glob("*.jinja"))}
TEMPLATES |= {f"{name} built in": template_text(name) for name in NAMES}
CONTROL = ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<bos>", "<think>", "</think>", "[INST]", "<|eot_id|>", "\n\n"]
WORDS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(CONTROL),
    st.sampled_from([" ", "\n", "\t", "a", "é", "漢字", "\U0001f642", "e\u0301"]),
)
TEXT = st.lists(WORDS, min_size=1, max_size=6).map("".join)
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def conversations(draw: st.DrawFn) -> Record:
    prompt = [system(draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [user(draw(TEXT)), assistant(draw(TEXT))]
    prompt.append(user(draw(TEXT)))
    responses = []
    for _ in range(2):
        more = [turn for _ in range(draw(st.integers(0, 1))) for turn in (user(draw(TEXT)), assistant(draw(TEXT)))]
        responses.append([assistant(draw(TEXT)), *more])
    return Record(prompt, tuple(responses), ((0, 1),))


@cache
def byte_level(name: str) -> Any:
    return build_tokenizer(name, TEMPLATES[name])


@cache
def llama(name: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


@cache
def encoder_of(load: Callable[[str], Any], name: str) -> Encoder:
    return Encoder(load(name))


def check(load: Callable[[str], Any], name: str, record: Record, loss_on: str) -> None:
    tokenizer, encoder = load(name), encoder_of(load, name)
    renderer = Renderer(tokenizer, {}, loss_on)
    try:
        rendered = renderer.render(record)
    except (Reject, DataError):
        return
    prompt, answers = encoder.encode([rendered])[0]
    alone = encoder.encode([renderer.render(Record(record.prompt, ()))])[0][0]
    assert prompt == alone
    assert prompt.count(tokenizer.bos_token_id) == rendered.prompt.count(tokenizer.bos_token)
    ends = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for response, answer, completion in zip(record.responses, answers, rendered.completions, strict=True):
        runs: list[list[int]] = []
        for at, token in enumerate(answer.ids):
            if answer.scored[at]:
                runs += [[]] if at == 0 or not answer.scored[at - 1] else []
                runs[-1].append(token)
        assert runs[-1][-1] in ends
        assert runs[-1].count(runs[-1][-1]) == 1
        whole = tokenizer.decode([*prompt, *answer.ids])
        given = rendered.prompt + completion.text + (tokenizer.eos_token if completion.needs_eos else "")
        assert whole.removeprefix(tokenizer.bos_token) == given.replace(BREAK, "").removeprefix(tokenizer.bos_token)
        last = response[-1]["content"].rpartition("</think>")[2]
        while (stripped := last.strip()).endswith(tokenizer.eos_token):
            last = stripped.removesuffix(tokenizer.eos_token)
        assert stripped.replace(BREAK, "") in tokenizer.decode(runs[-1])


@pytest.mark.parametrize("name", TEMPLATES)
@given(record=conversations(), loss_on=st.sampled_from(["assistant", "last"]))
@SETTINGS
def test_answers_of_a_byte_level_tokenizer(name: str, record: Record, loss_on: str) -> None:
    check(byte_level, name, record, loss_on)


@pytest.mark.skipif(not LLAMA.is_dir(), reason="the real tokenizer is not here")
@pytest.mark.parametrize("name", ["zephyr", "mistral-v0.1", "llama2", "mistral built in"])
@given(record=conversations(), loss_on=st.sampled_from(["assistant", "last"]))
@SETTINGS
def test_answers_of_the_llama_tokenizer(name: str, record: Record, loss_on: str) -> None:
    check(llama, name, record, loss_on)
