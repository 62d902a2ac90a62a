import pytest
import yaml

from dpoctl.runs.redact import HIDDEN, redact, redact_command, redact_source, redact_text

TOKEN = "hf_" + "AbCdEf0123456789" * 2


def test_values_below_secret_names_are_hidden_at_any_depth():
    config = {
        "hub_token": "x",
        "data": {"train": [{"api_key": "y", "path": "rows.jsonl"}]},
        "password": "z",
        "db-secret": ["a"],
    }
    assert redact(config) == {
        "hub_token": HIDDEN,
        "data": {"train": [{"api_key": HIDDEN, "path": "rows.jsonl"}]},
        "password": HIDDEN,
        "db-secret": [HIDDEN],
    }


def test_words_that_only_contain_token_are_left_alone():
    config = {"max_tokens_per_device": "auto", "tokenizer": {"vocab_size": 512}, "tokens": "a b", "num_tokens": 3}
    assert redact(config) == config


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"use {TOKEN} now", f"use {HIDDEN} now"),
        ("https://me:pass@host/x?a=1", f"https://{HIDDEN}@host/x?a=1"),
        ("s3://b/k?X-Amz-Signature=abc&part=1", f"s3://b/k?X-Amz-Signature={HIDDEN}&part=1"),
        ("alignment-handbook/zephyr-7b-sft-qlora", "alignment-handbook/zephyr-7b-sft-qlora"),
        ("hf_hub", "hf_hub"),
        ("a@b.example", "a@b.example"),
    ],
)
def test_tokens_and_passwords_inside_text_are_hidden(text, hidden):
    assert redact_text(text) == hidden


def test_a_command_line_keeps_all_but_its_secrets():
    command = ["dpoctl", "dpo", "r.yaml", "--token", "abc", "--api-key=abc", "--set", "x.hub_token=abc", "--set"]
    command += ["max_tokens_per_device=512", TOKEN]
    assert redact_command(command) == [
        *("dpoctl", "dpo", "r.yaml", "--token", HIDDEN, f"--api-key={HIDDEN}", "--set", f"x.hub_token={HIDDEN}"),
        *("--set", "max_tokens_per_device=512", HIDDEN),
    ]


def test_the_names_of_a_tokenizers_own_tokens_are_no_secrets():
    config = {"eos_token": "</s>", "from_scratch": {"pad_token": "<pad>"}, "hub_token": "x"}
    assert redact(config) == config | {"hub_token": HIDDEN}
    assert redact_source("eos_token: </s>\n") == "eos_token: </s>\n"


def test_secrets_of_a_recipe_and_of_a_traceback_are_hidden_where_they_stand():
    text = "model: {hub_token: abc, r: 8}\n  password = 'xyz'\napi_key: \"q\"\nmax_tokens_per_device: 512\n"
    assert redact_source(text) == (
        f"model: {{hub_token: {HIDDEN}, r: 8}}\n  password = '{HIDDEN}'\napi_key: \"{HIDDEN}\"\n"
        "max_tokens_per_device: 512\n"
    )


def test_what_is_hidden_once_stays_as_it_is_and_stays_a_word():
    once = redact_source("kwargs:\n  hub_token: abc\n")
    assert redact_source(once) == once
    assert yaml.safe_load(once) == {"kwargs": {"hub_token": HIDDEN}}


def test_what_the_environment_calls_a_secret_is_hidden_in_any_text(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "canary-4711")
    monkeypatch.setenv("OTHER_TOKEN", "short")
    assert redact_text("got canary-4711 and short") == f"got {HIDDEN} and short"
