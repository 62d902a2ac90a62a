import json

import pytest
import yaml

from dpoctl import console
from dpoctl.cli import failure
from dpoctl.errors import SetupError
from dpoctl.redact import HIDDEN, find_secret, redact, redact_command, redact_source, redact_text, redact_traceback

TOKEN = "hf_" + "AbCdEf0123456789" * 2
HARMLESS = [
    *("hf_datasets", "runs/hf_checkpoints2024/x", "token-data", "secret-santa/rows.jsonl", "sk-learn-preferences-data"),
    *("alignment-handbook/zephyr-7b-sft-qlora", "eos_token=</s>", "max_tokens_per_device=512"),
    *("a@b.example", "a bearer of bad news", "https://host:8080/a@b", "lora.target_modules=[q_proj,v_proj]"),
    *("sort_key=score", "hf_hub", "--option next_token=7"),
]


@pytest.mark.parametrize("text", HARMLESS)
def test_names_that_begin_or_end_like_a_secret_stay(text):
    assert find_secret(text) is None
    assert redact_text(text) == redact_source(text) == text
    assert redact_command([text]) == [text]


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"use {TOKEN} now", f"use {HIDDEN} now"),
        ("https://me:pass@host/x?a=1", f"https://{HIDDEN}@host/x?a=1"),
        ("https://me:p@ss/w@host", f"https://{HIDDEN}@host"),
        ("s3://b/k?X-Amz-Signature=abc&part=1", f"s3://b/k?X-Amz-Signature={HIDDEN}&part=1"),
        ("Server=x;Password=two words;Port=1", f"Server=x;Password={HIDDEN};Port=1"),
        ("Authorization: Bearer abcdefghijklmnop", f"Authorization: {HIDDEN}"),
        ("login(passphrase = 'two words', n=1)", f"login(passphrase = '{HIDDEN}', n=1)"),
        ('{"apiKey": "two words", "n": 1}', f'{{"apiKey": "{HIDDEN}", "n": 1}}'),
    ],
)
def test_tokens_and_passwords_inside_text_are_hidden(text, hidden):
    assert redact_text(text) == hidden
    assert redact({"a": [text]}) == {"a": [hidden]}


def test_a_command_line_keeps_all_but_its_secrets():
    command = ["dpoctl", "dpo", "r.yaml", "--token", "abc", "--api-key=abc", "--set", "x.hub_token=abc", "--set"]
    command += ["max_tokens_per_device=512", TOKEN, "--db-pass", "two words", "hf_datasets/token-data"]
    assert redact_command(command) == [
        *("dpoctl", "dpo", "r.yaml", "--token", HIDDEN, f"--api-key={HIDDEN}", "--set", f"x.hub_token={HIDDEN}"),
        *("--set", "max_tokens_per_device=512", HIDDEN, "--db-pass", HIDDEN, "hf_datasets/token-data"),
    ]


def test_what_follows_the_name_of_a_secret_is_hidden_to_its_end():
    text = (
        "model: {hub_token: abc def, r: 8}\n  password = 'xyz\napi_key: |\n  one two\n\n  three\nmax_tokens: 512\n"
        "secrets:\n- one\n- two\nn: 1\neos_token: </s>\n"
    )
    assert redact_source(text) == (
        f"model: {{hub_token: {HIDDEN}\n  password = {HIDDEN}\napi_key: {HIDDEN}\n  {HIDDEN}\n\n  {HIDDEN}\n"
        f"max_tokens: 512\nsecrets:\n{HIDDEN}\n{HIDDEN}\nn: 1\neos_token: </s>\n"
    )


def test_what_is_hidden_once_stays_as_it_is_and_stays_a_word():
    once = redact_source("kwargs:\n  hub_token: abc\n")
    assert redact_source(once) == once
    assert yaml.safe_load(once) == {"kwargs": {"hub_token": HIDDEN}}


def test_a_traceback_keeps_its_code_and_hides_its_message():
    text = (
        'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    token = next(tokens)\n'
        "ValueError: token: one two\n\nDuring handling of the above exception, another exception occurred:\n\n"
        'Traceback (most recent call last):\n  File "a.py", line 2, in g\n    log_in(password="x")\nOSError: no\n'
    )
    hidden = text.replace("one two", HIDDEN).replace('"x"', f'"{HIDDEN}"')
    assert redact_traceback(text) == hidden


PLANTED = "planted value/with=signs é'\"\\ and more"


@pytest.mark.parametrize("name", ["MY_API_KEY", "DB_PASS", "OPENAI_KEY", "SOMETHING", "X"])
def test_values_of_the_environment_are_hidden_in_any_text_and_form(name, monkeypatch):
    monkeypatch.setenv(name, PLANTED)
    monkeypatch.setenv("OTHER_TOKEN", "short")
    forms = [PLANTED, repr(PLANTED), json.dumps(PLANTED), json.dumps([PLANTED]), f"{PLANTED[:15]}...", f"x{PLANTED}x"]
    for form in forms:
        assert "planted" not in redact_text(f"got {form} and short")
        assert "and more" not in redact_text(form)
    assert redact_text(f"got {PLANTED} and short") == f"got {HIDDEN} and short"


def test_a_password_inside_of_a_variable_is_hidden_by_itself(monkeypatch):
    monkeypatch.setenv("DATABASE", "postgres://me:correct-horse@host/db")
    assert redact_text("login of me with correct-horse failed") == f"login of me with {HIDDEN} failed"


def test_paths_and_open_variables_are_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_FOLDER", str(tmp_path))
    monkeypatch.setenv("SEVERAL", f"{tmp_path}:/usr/lib")
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.setenv("SITE", "production")
    text = f"{tmp_path}:/usr/lib en_US.UTF-8 https://hub.example reproductions"
    assert redact_text(text) == text


def test_errors_and_warnings_are_printed_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    url = "https://me:AbCdEfGhIjKl@hub/model"
    failure.report(SetupError(f"model folder '{url}' does not exist", hint="hf_AbCdEfGhIjKl"), as_json=True, debug=True)
    failure.report(OSError(f"no {url}"), as_json=True, debug=True)
    console.stderr.cache_clear()
    console.warn(f"hub data set {url!r}: stale")
    console.say(f"tokenizing train: {url}")
    out, err = capsys.readouterr()
    assert "AbCdEfGhIjKl" not in out + err
    assert err.count("https://<redacted>@hub/model") >= 4
