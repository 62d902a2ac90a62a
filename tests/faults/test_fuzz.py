"""Whatever is fed to recipes, converter and templates: a refusal of ours or a good end, and never a traceback."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpoctl.cli.app import main
from dpoctl.data.chat_template import ChatTemplate
from dpoctl.data.records import Reject
from dpoctl.errors import DataError, UsageError
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.consistency import resolved_yaml
from dpoctl.recipe.schema import Recipe


def cases(count: int) -> settings:
    """So many examples; a third of them, unless every case is played."""
    count = count if settings.get_current_profile_name() == "whole" else count // 3
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["auto", "none", "5e-7", "yes", "~", "{", "*a", "!!python/name:os.system", "\u2028", "../../x"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
)
GOOD: dict[str, Any] = {
    "method": "dpo",
    "model": {"model_name_or_path": "some/model"},
    "data": {"train": ["pairs.jsonl"]},
    "training": {"output_dir": "runs/x", "learning_rate": 5e-7},
}


@cache
def keys() -> list[tuple[str, str]]:
    return [
        (section, key)
        for section, field in Recipe.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {"": None})
    ]


def accepts_or_refuses(text: str) -> None:
    with suppress(UsageError):
        recipe = parse_recipe(text, "r.yaml", command="dpo")
        assert parse_recipe(resolved_yaml(recipe), "again", command="dpo") == recipe


@cases(700)
@given(st.sampled_from(keys()), VALUES)
def test_any_value_of_any_key_is_read_or_refused(place: tuple[str, str], value: Any) -> None:
    section, key = place
    changed = json.loads(json.dumps(GOOD))
    if key:
        held = changed.setdefault(section, {})
        if isinstance(held, dict):
            held[key] = value
    else:
        changed[section] = value
    accepts_or_refuses(yaml.safe_dump(changed, allow_unicode=True))


@cases(400)
@given(st.text(max_size=120))
def test_any_text_is_no_recipe(text: str) -> None:
    accepts_or_refuses(text)


@cases(400)
@given(st.data())
def test_a_recipe_that_is_cut_and_glued_is_read_or_refused(data: st.DataObject) -> None:
    text = yaml.safe_dump(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 12))
        put = data.draw(
            st.sampled_from(["", ":", "- ", "{", "]", "&a ", "*a", "\t", "\n", "'", '"', "|", "? ", "\x00", "<<: "])
        )
        text = text[:at] + put + text[at + length :]
    accepts_or_refuses(text)


PIECES = st.sampled_from(
    ["prompt", "chosen", "rejected", "messages", "role", "content", "user", "assistant", "system", "score", "label",
     "responses", "scores", "pairs", "completion", "conversations", "from", "value", "human", "gpt", "\ud800", "a"]
)  # fmt: skip
ROWS = st.recursive(
    st.one_of(LEAVES, PIECES),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(PIECES, inner, max_size=5)),
    max_leaves=12,
)
Convert = Callable[[Path], tuple[int, str]]


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Convert:
    def call(path: Path) -> tuple[int, str]:
        out = path.with_name("out.jsonl")
        out.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["dpoctl", "convert-data", str(path), "-o", str(out)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        assert out.exists() == (ended.value.code == 0)
        assert not [entry for entry in path.parent.iterdir() if entry.name.startswith(".") or "tmp" in entry.name]
        return ended.value.code, said.err

    return call


def converts_or_refuses(convert: Convert, path: Path) -> None:
    began = time.process_time()
    code, said = convert(path)
    assert code in (0, 2, 3), said
    assert "Traceback" not in said
    assert time.process_time() - began < 10


@cases(300)
@given(rows=st.lists(ROWS, min_size=1, max_size=3))
def test_any_rows_are_converted_counted_or_refused(rows: list[Any], convert: Convert, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    converts_or_refuses(convert, path)


@cases(200)
@given(content=st.binary(max_size=200), name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"]))
def test_any_bytes_are_converted_or_refused(content: bytes, name: str, convert: Convert, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    converts_or_refuses(convert, path)
    path.unlink()


WRITTEN = st.lists(
    st.sampled_from(
        ["{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{% if m.role == 'user' %}",
         "{% else %}", "{% endif %}", "{{ messages[0].content * 9 }}", "{{ bos_token }}", "{{ raise_exception('no') }}",
         "{% set x = namespace(a=1) %}", "{{ x.a ** 99 }}", "{{ ''.__class__ }}", "{% macro f(x) %}", "{% endmacro %}",
         "{{ f(1) }}", "{{", "%}", "{#", "text", "\u2028", "{{ range(10**9) }}", "{{ tools | tojson }}", "{% break %}",
         "{% generation %}", "{% endgeneration %}", "{{ strftime_now('%Y') }}", "{{ 1 / 0 }}", "{% include 'x' %}"]
    ),
    max_size=8,
).map("".join)  # fmt: skip


@cases(400)
@given(template=WRITTEN, content=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_template_renders_or_refuses(template: str, content: str, tokenizer: Any) -> None:
    import copy

    own = copy.copy(tokenizer)
    own.chat_template = template
    messages: list[Any] = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    with suppress(Reject, DataError):
        assert isinstance(ChatTemplate(own, {}).apply(messages, generate=False), str)
