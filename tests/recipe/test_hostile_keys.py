"""Hostile recipes: every key with every kind of wrong value, and files that are no recipe; each ends in one line."""

import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from good_recipe import GOOD
from tiny_runs import merge

from dpoctl.cli.app import main
from dpoctl.recipe import RecipeError, parse_recipe
from dpoctl.recipe.consistency import resolved_yaml
from dpoctl.recipe.data_section import Source
from dpoctl.recipe.diagnostics import Diagnostic, dotted
from dpoctl.recipe.document import write_yaml
from dpoctl.recipe.loader import keys_of
from dpoctl.recipe.schema import Recipe

BASE = yaml.safe_load(GOOD.replace("5e-7", "5.0e-7"))
HERE = "@here@"
SOURCE = "data.train[0]"
VALUES = {
    "null": "null",
    "a flag": "true",
    "a word for a flag": "yes",
    "a negative number": "-1",
    "zero": "0",
    "a fraction": "0.5",
    "a huge number": "1" + "0" * 30,
    "a number with too many digits": "9" * 5000,
    "not a number": ".nan",
    "an infinite number": "-.inf",
    "beyond every float": "1e999",
    "a number in quotes": "'1'",
    "a date": "2024-01-02",
    "an empty text": "''",
    "a long text": "x" * 5000,
    "a text with a NUL": '"a\\0b"',
    "escape sequences": '"\\e[2J\\u202e\\a"',
    "half a character": '"\\ud800"',
    "a path out of here": "../../../etc/passwd",
    "nobody's home": "~nobodyhere/x",
    "a list of rubbish": "[1, {a: b}, null]",
    "an empty list": "[]",
    "a mapping of rubbish": "{a: {b: [c]}}",
    "an alias": "*nothing",
    "a tag": "!!python/object/apply:os.system [id]",
    "a nest": "[" * 30 + "]" * 30,
}
NEVER = {
    *("a number with too many digits", "not a number", "an infinite number", "beyond every float"),
    *("a text with a NUL", "half a character", "an alias", "a tag", "a nest", "a list of rubbish"),
}
FREE = {"data.chat_template_kwargs", f"{SOURCE}.format_options"}
TEXTS = {"a long text", "escape sequences", "a path out of here", "nobody's home", "a word for a flag"}


def places() -> list[str]:
    """Every key of the schema, and those of a source."""
    return [*(dotted(path) for path in keys_of(Recipe)), *(f"{SOURCE}.{key}" for key in Source.model_fields)]


def with_value(key: str, value: str) -> tuple[str, int]:
    """The good recipe with a value at a key, and the line that it stands on."""
    if key.startswith(SOURCE):
        changes = {"data.train": [{"path": "pairs.jsonl"} | {key.removeprefix(f"{SOURCE}."): HERE}]}
    else:
        changes = {key: HERE}
    text = write_yaml(merge(BASE, changes)).replace(f"'{HERE}'", HERE)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if HERE in line)
    return text.replace(HERE, value), line


def is_at(problem: Diagnostic, key: str, line: int) -> bool:
    """Whether a problem is of the key, or of a section around it that is not complete."""
    around = [problem.path, problem.path[:-1]] if len(problem.path) > 2 else [problem.path]
    assert problem.place
    return problem.place.line == line or any(key.startswith(f"{dotted(section)}.") for section in around)


def accepted(key: str) -> set[str]:
    """The values that a key takes; of the others, that the refusal is as it should be."""
    return {name for name, value in VALUES.items() if is_taken(key, *with_value(key, value))}


def is_taken(key: str, text: str, line: int) -> bool:
    read = partial(parse_recipe, command="dpo")
    try:
        recipe = read(text, "r.yaml")
    except RecipeError as error:
        refused = error
    else:
        assert read(resolved_yaml(recipe), "again") == recipe
        return True
    assert refused.exit_code == 2
    assert any(is_at(problem, key, line) for problem in refused.problems), str(refused)
    assert len(str(refused).splitlines()) == 3 * len(refused.problems)
    for problem in refused.problems:
        assert re.match(r"r\.yaml:\d+:\d+: error: ", str(problem))
        assert "\n" not in str(problem)
        assert problem.message.isprintable()
        assert len(problem.message) < 800
    return False


@pytest.mark.parametrize("key", places())
def test_every_hostile_value_is_refused_at_its_place_or_means_what_it_says(key: str) -> None:
    taken = accepted(key)
    assert not taken & NEVER
    # A date is a text, and what takes none takes no text that it does not know.
    assert "a date" in taken or not taken & TEXTS
    assert "a mapping of rubbish" not in taken or key in FREE


def test_there_are_more_than_two_thousand_hostile_recipes() -> None:
    assert len(places()) * len(VALUES) + len(RAW) + len(FILES) + len(OVERRIDES) > 2000


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a, *a, *a]\n" for i in range(300))
RAW: dict[str, bytes] = {
    "nothing": b"",
    "blanks": b" \n\n \n",
    "a comment": b"# method: dpo\n",
    "a number": b"7\n",
    "a text": b"method\n",
    "a list": b"- method: dpo\n",
    "null": b"null\n",
    "JSON of a list": b'["method"]',
    "three dots": b"...\n",
    "three dashes": b"---\n---\n",
    "a directive": b"%YAML 9.9\n---\nmethod: dpo\n",
    "an unknown directive": b"%EVIL x\n---\nmethod: dpo\n",
    "a billion laughs": LAUGHS.encode() + GOOD.encode(),
    "an alias of itself": b"a: &a [*a]\n" + GOOD.encode(),
    "an anchor on the root": b"&a\n" + GOOD.encode(),
    "merge keys": GOOD.replace("  output_dir", "  <<: [{seed: 1}, {seed: 2}]\n  output_dir").encode(),
    "a key twice": GOOD.encode() + b"method: sft\n",
    "a section twice": GOOD.encode() + b"training: {seed: 1}\n",
    "a key twice, deep": GOOD.encode() + b"lora: {r: 8, r: 9}\n",
    "a Python object": GOOD.encode() + b"lora: !!python/object/apply:os.system ['id']\n",
    "a Python name": GOOD.encode() + b"lora: !!python/name:os.system\n",
    "a tag on the root": b"!!map\n" + GOOD.encode(),
    "a tag of one's own": GOOD.encode() + b"lora: !evil {r: 8}\n",
    "binary": GOOD.encode() + b"lora: !!binary aGVsbG8=\n",
    "100,000 lists": GOOD.encode() + b"lora: " + b"[" * 100_000,
    "100,000 mappings": GOOD.encode() + b"lora: " + b"{a: " * 100_000,
    "100,000 indents": GOOD.encode() + b"".join(b" " * n + b"a:\n" for n in range(400)),
    "100,000 dashes": GOOD.encode() + b"lora:\n " + b"- " * 100_000,
    "100,000 keys": GOOD.encode() + b"".join(b"k%d: 1\n" % n for n in range(60_000)),
    "a key of 100,000 letters": GOOD.encode() + b"k" * 100_000 + b": 1\n",
    "a NUL": GOOD.encode() + b"lora: a\0b\n",
    "only NULs": b"\0" * 1000,
    "UTF-16": GOOD.encode("utf-16"),
    "UTF-16 without a mark": GOOD.encode("utf-16-le"),
    "UTF-32": GOOD.encode("utf-32"),
    "Latin-1": GOOD.encode() + "# é\n".encode("latin-1"),
    "half a UTF-8 character": GOOD.encode() + b"lora: \xe2\x82\n",
    "a surrogate in UTF-8": GOOD.encode() + b"lora: \xed\xa0\x80\n",
    "two megabytes": GOOD.encode() + b"# " + b"x" * (2 << 20),
    "random bytes": bytes(range(256)) * 8,
    "gzip": b"\x1f\x8b\x08\x00" + bytes(64),
    "a tab": GOOD.replace("  output_dir", "\toutput_dir").encode(),
    "a quote never closed": GOOD.encode() + b"lora: 'x\n",
    "a double quote never closed": GOOD.encode() + b'lora: "x\n',
    "a bracket never closed": GOOD.encode() + b"lora: {r: [1\n",
    "a bracket too many": GOOD.encode() + b"lora: {r: 8}}\n",
    "a wrong escape": GOOD.encode() + b'lora: "\\q"\n',
    "an escape too far": GOOD.encode() + b'lora: "\\Uffffffff"\n',
    "a block text without an end": GOOD.encode() + b"lora: |999\n",
    "a key that is a list": GOOD.encode() + b"? [a, b]\n: 1\n",
    "a key that is a mapping": GOOD.encode() + b"? {a: b}\n: 1\n",
    "a key that is empty": GOOD.encode() + b": 1\n",
    "a key that is null": GOOD.encode() + b"null: 1\n",
    "a key that is a number": GOOD.encode() + b"1: 1\n",
    "two colons": GOOD.encode() + b"lora: a: b\n",
    "a second document": GOOD.encode() + b"---\nmethod: sft\n",
    "a document after its end": GOOD.encode() + b"...\nlora: 1\n",
    "a colon too few": GOOD.replace("method: dpo", "method dpo").encode(),
    "a wrong indent": GOOD.replace("  learning_rate", "   learning_rate").encode(),
    "separators of lines": (GOOD + "lora:\u2028  r: x\u2029\x85").encode(),
    "a mark in the middle": (GOOD + "\ufefflora: 1\n").encode(),
    "directions turned round": (GOOD + "\u202elora: 1\n").encode(),
    "a shell": b"#!/bin/sh\nrm -rf /\n",
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "TOML": b"[training]\nlearning_rate = 5e-7\n",
    "Python": b"import os\nos.system('id')\n",
}


def refused(name: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one error of a run of a recipe that ends at once and leaves nothing."""
    before = sorted(Path().rglob("*"))
    sys.argv = ["dpoctl", "dpo", name, *options]
    began = time.process_time()
    with pytest.raises(SystemExit) as ended:
        main()
    assert time.process_time() - began < 10
    assert ended.value.code == 2
    assert sorted(Path().rglob("*")) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert not set(err) & set(map(chr, [*range(9), *range(11, 32)]))
    return err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])


@pytest.mark.parametrize("name", RAW)
def test_a_file_that_is_no_recipe_is_refused_at_its_place(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("raw.yaml").write_bytes(RAW[name])
    err = refused("raw.yaml", capsys)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert errors
    assert all(re.match(r"raw\.yaml:\d+:\d+: error: .{5,800}$", line) for line in errors)


FILES = {
    "a pipe that nobody writes to": ("pipe", "pipe:1:1: error: "),
    "a link to itself": ("loop", "there is no recipe"),
    "a link to nowhere": ("nowhere", "there is no recipe"),
    "a folder": ("folder", "is a folder"),
    "a device without an end": ("/dev/zero", "larger than 1 MiB"),
    "a device without a beginning": ("/dev/null", "got nothing"),
    "the memory of a process": ("/proc/self/mem", "cannot be read"),
    "a name that is too long": ("x" * 300, "File name too long"),
    "a path that is too long": ("x/" * 5000, "File name too long"),
    "nobody's home": ("~nobodyhere/x", "there is no recipe"),
    "an address": ("http://127.0.0.1:1/r.yaml", "there is no recipe"),
    "a dash": ("-", "there is no recipe"),
    "escape sequences": ("\x1b[2J\u202e.yaml", "there is no recipe"),
    "a NUL": ("a\0b", "null byte"),
    "half a character": ("\ud800", "surrogates not allowed"),
    "no name": ("", "is a folder"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_a_recipe_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("nowhere").symlink_to("gone")
    Path("folder").mkdir()
    path, said = FILES[name]
    assert said in refused(path, capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_recipe_that_may_not_be_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(GOOD)
    Path("r.yaml").chmod(0)
    assert "cannot be read: Permission denied" in refused("r.yaml", capsys)


OVERRIDES = [
    *("", "=", "=1", "a", "a=1", "training", "training=1", "training.=1", ".seed=1", "training..seed=1", "seed=[1"),
    *(
        "seed=&a 1",
        "seed=*a",
        "seed=!!int 1",
        "seed=.nan",
        "seed=1\n---\n2",
        "train[7]=x",
        "data.train[x]=x",
        "__class__=1",
    ),
    *(
        'training.output_dir="\\0"',
        "training.output_dir=~nobodyhere",
        f"training.output_dir={'x' * 5000}",
        "seed={a: 1, a: 2}",
    ),
    *("model.trust_remote_code=yes", "seed=" + "[" * 100, "seed=" + "9" * 9999, "\ud800=1", "lora=\x1b[2J", "\x1b=1"),
]


@pytest.mark.parametrize("override", OVERRIDES, ids=range(len(OVERRIDES)))
def test_a_hostile_override_is_refused_by_its_number(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(GOOD)
    err = refused("r.yaml", capsys, "--set", "training.weight_decay=0.1", "--set", override)
    assert re.search(r"^--set #2: error: .{5,500}$", err, re.MULTILINE), err


def test_json_of_a_refusal_is_one_object_with_the_place(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(GOOD.replace("5e-7", '"\\0"'))
    sys.argv = ["dpoctl", "dpo", "r.yaml", "--json"]
    with pytest.raises(SystemExit):
        main()
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["file"], error["line"], error["column"]) == (2, "r.yaml", 8, 18)
