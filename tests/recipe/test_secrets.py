"""Secrets in recipes and arguments: refused at their place, and shown nowhere."""

import sys
from pathlib import Path

import pytest
import yaml
from good_recipe import GOOD

from dpoctl.cli.app import main
from dpoctl.recipe import RecipeError, examine_recipe, parse_recipe
from dpoctl.recipe.loader import keys_of
from dpoctl.recipe.pair_generation import ContrastiveRecipe
from dpoctl.recipe.sampled_pairs import SampledRecipe
from dpoctl.recipe.schema import Recipe
from dpoctl.recipe.secrets import without_secrets
from dpoctl.redact import is_secret_name

WORDS = "correct horse canary"
RANDOM = "kANary7Qx9Zt2LmB4vR8"
PEM = "-----BEGIN OPENSSH PRIVATE KEY-----"
KWARGS = "data:\n  chat_template_kwargs:\n"


def kwargs(*lines: str) -> str:
    return GOOD.replace("data:\n", KWARGS + "".join(f"    {line}\n" for line in lines))


IN_FILES = {
    "a word": kwargs("hub_token: canary"),
    "with blanks": kwargs(f"password: {WORDS}"),
    "in quotes": kwargs(f'passphrase: "{WORDS}"'),
    "in single quotes": kwargs(f"'db_pass': '{WORDS}'"),
    "over two lines": kwargs("passwd: correct horse", "  battery canary"),
    "in quotes over two lines": kwargs('secret: "correct horse', '  battery canary"'),
    "a block": kwargs("private_key: |", "  correct horse", "  battery canary"),
    "a folded block": kwargs("client_secret: >-", "  correct", "", "  canary"),
    "a list": kwargs("api_keys:", "- first one", "- canary two"),
    "a list in brackets": kwargs(f"secrets: [{WORDS}, other]"),
    "a mapping below": kwargs("credentials:", "  user: me", f"  word: {WORDS}"),
    "a list of mappings": kwargs("logins:", f"- {{user: me, password: {WORDS}}}"),
    "a number": kwargs("password: 8817canary7788"),
    "camel case": kwargs(f"apiKey: {WORDS}"),
    "capitals": kwargs("OPENAI_API_KEY: canary"),
    "dashes": kwargs("access-token: canary"),
    "dots": kwargs("db.password: canary"),
    "a suffix": kwargs("api_key_2: canary", "r: 1"),
    "a vague name": kwargs(f"openai_key: {RANDOM}"),
    "DB_PASS": kwargs(f"DB_PASS: {WORDS}"),
    "GITHUB_PAT": kwargs("GITHUB_PAT: canary"),
    "authorization": kwargs(f"Authorization: {WORDS}"),
    "cookie": kwargs("cookie: session=canary"),
    "a private key": kwargs("x: |", f"  {PEM}", "  canary0123", "  -----END OPENSSH PRIVATE KEY-----"),
    "a private key in one line": kwargs(f'x: "{PEM}\\ncanary\\n-----END"'),
    "Bearer": kwargs("header: Bearer canary0123456789"),
    "Basic": kwargs("x: 'Basic Y2FuYXJ5OmNhbmFyeQ=='"),
    "JWT": kwargs("x: eyJhbGciOiJIUzI1NiJ9.eyJjYW5hcnkiOiIxIn0.canary-0123"),
    "SAS": kwargs("x: https://a.blob.core.windows.net/c?sv=2022&se=2026&sig=canary%3D"),
    "signed URL": GOOD.replace("pairs.jsonl", '"https://s3.example/b?X-Amz-Credential=a&X-Amz-Signature=canary"'),
    "query": GOOD.replace("pairs.jsonl", '"https://host/rows.jsonl?api_key=canary"'),
    "login in the model": GOOD.replace("some/model", "https://user:canary@host/model"),
    "login in the data": GOOD.replace("pairs.jsonl", "https://user:canary@host/rows.jsonl"),
    "login with @ and /": GOOD.replace("pairs.jsonl", "https://user:p@ss/canary@host/rows"),
    "token as a login": GOOD.replace("pairs.jsonl", f"https://{RANDOM}@host/rows"),
    "login in the folder": GOOD.replace("runs/x", "s3://user:canary@bucket/x"),
    "connection string": kwargs("x: AccountName=a;AccountKey=canary==;EndpointSuffix=b"),
    "connection string with blanks": kwargs(f"x: Server=db;Password={WORDS};Port=1"),
    "Hugging Face": kwargs(f"x: hf_{RANDOM}"),
    "Hugging Face as a key": kwargs(f"hf_{RANDOM}: 1"),
    "Hugging Face in a text": kwargs(f"x: log in with hf_{RANDOM} first"),
    "Hugging Face as a model": GOOD.replace("some/model", f"hf_{RANDOM}"),
    "GitHub": kwargs("x: ghp_canary0123456789canary0123456789abcd"),
    "GitHub, new": kwargs("x: github_pat_11CANARY0_canary0123456789"),
    "GitLab": kwargs("x: glpat-canary0123456789ab"),
    "OpenAI": kwargs(f"x: sk-proj-{RANDOM}"),
    "Anthropic": kwargs(f"x: sk-ant-api03-{RANDOM}"),
    "Slack": kwargs("x: xoxb-0123-canary"),
    "Amazon": kwargs("x: AKIACANARYCANARY0123"),
    "Google": kwargs(f"x: AIzaSy{RANDOM}canary01234567"),
    "W&B": kwargs(f"x: wandb_v1_{RANDOM}"),
    "npm": kwargs(f"x: npm_{RANDOM}canary"),
    "unknown key of a section": GOOD.replace("training:\n", f"training:\n  wandb_api_key: {WORDS}\n"),
    "unknown section": f"{GOOD}passphrase: {WORDS}\n",
    "beside a mistake": GOOD.replace("5e-7", "fast") + f"hub_token: {WORDS}\n",
    "on the line of a mistake": f"{GOOD}lora: {{rr: 8, hub_token: {WORDS}}}\n",
    "replaced by an override": GOOD.replace("some/model", "https://user:canary@host/model"),
}
BROKEN = {
    "an open bracket": f"{GOOD}x: {{hub_token: {WORDS}\n",
    "an open quote": f'{GOOD}password: "{WORDS}\n',
    "a block below": f"{GOOD}passphrase: |\n  fine\n  {WORDS}\n {WORDS}: [\n",
    "a list below": f"{GOOD}secrets:\n  - {WORDS}\n  - [{WORDS}\n",
    "a tab": f"{GOOD}x:\n\tapi_key: {WORDS}\n",
    "two values": f"{GOOD}api_key: {WORDS}: more\n",
    "twice": f"{GOOD}api_key: {WORDS}\napi_key: {WORDS} two\n",
}
OVERRIDES = {
    "a key": f"data.chat_template_kwargs.hub_token={WORDS}",
    "a mapping": f'data.chat_template_kwargs={{"password": "{WORDS}"}}',
    "only a mapping": f'{{"password": "{WORDS}"}}',
    "an open mapping": f'data.chat_template_kwargs={{"password": "{WORDS}"',
    "only a token": f"hf_{RANDOM}",
    "a list": f"data.chat_template_kwargs.api_keys=[{WORDS}, a]",
    "a login": "data.train=https://me:canary@host/rows",
    "an unknown key": f"OPENAI_KEY={RANDOM}",
}


def canaries(text: str) -> list[str]:
    return [word for word in ("canary", "CANARY", RANDOM, "correct horse") if word in text]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dpoctl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def tried(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Call every command that reads a recipe, and return all that it prints and writes."""
    given = [word for text in overrides for word in ("--set", text)]
    shown = ""
    for command in (["dpo"], ["dpo", "--dry-run", "-v"], ["dpo", "--json", "--debug"], ["check"], ["inspect"]):
        assert call(monkeypatch, command[0], "r.yaml", *given, *command[1:]) == 2
        shown += "".join(capsys.readouterr())
    call(monkeypatch, "convert-data", "r.yaml", "--format", "contrastive", "-o", "out.jsonl", *given)
    shown += "".join(capsys.readouterr())
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert files == [Path("r.yaml")]
    return shown


@pytest.mark.parametrize("name", IN_FILES)
def test_a_secret_in_a_recipe_is_refused_and_shown_nowhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(IN_FILES[name])
    shown = tried(monkeypatch, capsys, *(["model.model_name_or_path=some/model"] if "override" in name else []))
    assert "and a run keeps a copy of its recipe; remove it, and " in shown
    assert canaries(shown) == []
    with pytest.raises(RecipeError) as refused:
        parse_recipe(IN_FILES[name], "r.yaml", command="dpo")
    assert all(problem.place and problem.place.line for problem in refused.value.problems)


@pytest.mark.parametrize("name", BROKEN)
def test_a_recipe_that_is_no_yaml_shows_no_secret_either(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(BROKEN[name])
    assert canaries(tried(monkeypatch, capsys)) == []


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_secret_in_an_override_is_refused_and_shown_nowhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(GOOD)
    # One that a later one replaces would stand in the command line.
    shown = tried(monkeypatch, capsys, OVERRIDES[name], "data.chat_template_kwargs={}")
    assert "--set #1: error: " in shown
    assert "looks like" in shown or name == "an open mapping"
    assert canaries(shown) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert-data", "https://me:canary@host/rows.jsonl"),
        ("convert-data", "rows.jsonl", "--option", "hub_token=canary"),
        ("eval", ".", "--data", "https://me:canary@host/rows.jsonl"),
        ("eval", ".", "--data", f"hf_{RANDOM}"),
    ],
)
def test_a_secret_in_an_argument_is_refused(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 2
    shown = "".join(capsys.readouterr())
    assert "looks like" in shown
    assert canaries(shown) == []


def test_the_value_of_a_secret_variable_is_refused_in_a_recipe_but_a_plain_word_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DB_PASS", "Tr0ub4dor&3!")
    monkeypatch.setenv("MY_SECRET", "secret-santa")
    with pytest.raises(RecipeError, match="environment variable DB_PASS"):
        parse_recipe(kwargs("x: the word is Tr0ub4dor&3!"), "r.yaml", command="dpo")
    parse_recipe(GOOD.replace("runs/x", "runs/secret-santa"), "r.yaml", command="dpo")


@pytest.mark.parametrize(
    "recipe",
    [
        GOOD.replace("some/model", "hf_checkpoints/sk-learn-preferences-data").replace("runs/x", "token-data/secret"),
        kwargs("bos_token: <s>", "enable_thinking: true", "image_token: 32000", "token: '[MASK]'", "password: ${PASS}"),
        kwargs("sort_key: score", "max_tokens: 12", "key: name", "next_token: it", "tokens: a b"),
        GOOD + "eval: {samples: {num: 2}, judge: {categories: {pass: [accept], secret: [no]}, target: pass}}\n",
        GOOD.replace("training:\n", "  eval: {secret: [hf_datasets.jsonl], token: [a.jsonl]}\ntraining:\n"),
        f"# the token comes from HF_TOKEN: hf_{RANDOM}\n{GOOD}",
    ],
)
def test_what_is_no_secret_stays_allowed(recipe: str) -> None:
    assert [problem for problem in examine_recipe(recipe, "r.yaml").problems if "looks like" in problem.message] == []


def test_no_key_of_a_recipe_has_the_name_of_a_secret() -> None:
    names = {str(path[-1]) for model in (Recipe, ContrastiveRecipe, SampledRecipe) for path in keys_of(model)}
    assert [name for name in names if is_secret_name(name)] == []


def test_comments_lose_their_secrets_and_all_else_stays() -> None:
    text = (
        f"# password: {WORDS}\nmethod: dpo # hf_{RANDOM}\nx: 'a # password: no comment' # api_key={RANDOM}\n"
        f"block: |  # DB_PASS: {WORDS}\n  # password: part of the text\n  é\n# {PEM}\n# canary\n# -----END\n"
        "list: [a, # b\n  c]\n# the last line"
    )
    written = without_secrets(text)
    assert canaries(written) == []
    assert yaml.safe_load(written) == yaml.safe_load(text)
    assert "'a # password: no comment'" in written
    assert "# password: part of the text" in written
    assert written.endswith("list: [a, # b\n  c]\n# the last line")
    assert without_secrets(GOOD) == GOOD


def test_no_recipe_takes_long_to_read() -> None:
    for piece in ("-eyJ", "a-", "a: ", "://a:b", "_github_pat_", "password: ", "bearer ", "sk-"):
        text = f"{GOOD}x: '{piece * (100_000 // len(piece))}'\n"
        with pytest.raises(RecipeError):
            parse_recipe(text, "r.yaml", command="dpo")
