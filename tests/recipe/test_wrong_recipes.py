"""Recipes that are refused: each with the place, what was expected or meant, and nothing else."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from good_recipe import GOOD

from dpoctl.cli.app import main
from dpoctl.recipe import Recipe, RecipeError, parse_recipe
from dpoctl.recipe.foreign_keys import KEYS, NOT_OFFERED, NOT_OFFERED_WHY, VALUES
from dpoctl.recipe.key_errors import choices, field_at
from dpoctl.recipe.loader import known_paths


def with_lines(*lines: str, at: str = "training:") -> str:
    """The good recipe with lines put under a section."""
    return GOOD.replace(f"{at}\n", f"{at}\n" + "".join(f"  {line}\n" for line in lines))


BILLION = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(9)) + GOOD
DEEP = GOOD + "lora: " + "[" * 5000 + "\n"

# name: (recipe, line:column, a piece of the message)
WRONG = {
    "misspelt key": (with_lines("warmup_ration: 0.1"), "7:3", "did you mean 'warmup_ratio'"),
    "misspelt section": (GOOD + "lroa: {r: 8}\n", "9:1", "did you mean 'lora'"),
    "key of another section": (with_lines("beta: 0.1"), "7:3", "did you mean 'dpo.loss.beta'"),
    "key of nobody": (with_lines("zzzz: 1"), "7:3", "unknown key 'zzzz'; the keys of training are output_dir"),
    "misspelt key of a source": (
        GOOD.replace("[pairs.jsonl]", "[{path: x, splt: a}]"),
        "5:21",
        "did you mean 'split'",
    ),
    "text for a number": (GOOD.replace("5e-7", "fast"), "8:18", "expected a number of at least 0, got 'fast'"),
    "quoted number": (GOOD.replace("5e-7", "'5e-7'"), "8:18", "remove the quotes"),
    "fraction for a whole number": (with_lines("save_steps: 1.5"), "7:15", "a whole number of at least 1"),
    "flag for a number": (with_lines("seed: true"), "7:9", "a whole number"),
    "yes for true": (with_lines("eval_on_start: yes"), "7:18", "expected true or false, got 'yes'"),
    "null for a number": (with_lines("logging_steps:"), "7:17", "remove the key to use its default"),
    "out of range": (with_lines("warmup_ratio: 1.5"), "7:17", "at most 1"),
    "zero batch": (with_lines("global_batch_size: 0"), "7:22", "at least 1, got 0"),
    "budget of nothing": (with_lines("max_tokens_per_device: 0"), "7:26", "auto, or a whole number"),
    "unknown choice": (with_lines("optim: adamw_apex"), "7:10", "did you mean 'adamw'"),
    "unknown loss": (GOOD + "dpo: {loss: {type: sigmod}}\n", "9:20", "did you mean 'sigmoid'"),
    "loss as a word": (GOOD + "dpo: {loss: ipo}\n", "9:13", "{type: sigmoid, beta: 0.1}"),
    "hyperparameter out of range": (GOOD + "dpo: {loss: {beta: 0}}\n", "9:20", "above 0"),
    "hyperparameter of another loss": (
        GOOD + "dpo: {loss: {type: ipo, label_smoothing: 0.1}}\n",
        "9:25",
        "the loss 'ipo' has no 'label_smoothing' (sigmoid, robust, exo_pair have it); it takes beta, sft_weight, avera",
    ),
    "duplicate key": (with_lines("seed: 1", "seed: 2"), "8:3", "(first set on line 7); remove one"),
    "missing key": (GOOD.replace("  learning_rate: 5e-7\n", ""), "6:1", "learning_rate: 5.0e-06"),
    "missing section": (GOOD.replace("data:\n  train: [pairs.jsonl]\n", ""), "1:1", "data: {train:"),
    "no model": (GOOD.replace("  model_name_or_path: some/model\n", "  dtype: auto\n"), "2:1", "from_scratch"),
    "empty source list": (GOOD.replace("[pairs.jsonl]", "[]"), "5:10", "got an empty list"),
    "section as a number": (GOOD + "lora: 8\n", "9:7", "a mapping with keys such as"),
    "not a number": (with_lines("weight_decay: .nan"), "7:17", "not a finite number"),
    "infinite": (with_lines("max_grad_norm: 1e999"), "7:18", "not a finite number"),
    "wrong method": (GOOD.replace("method: dpo", "method: sft"), "1:1", "run `dpoctl sft`"),
    "unknown method": (GOOD.replace("method: dpo", "method: ppo"), "1:9", "did you mean 'dpo'"),
    "unknown format": (
        GOOD.replace("[pairs.jsonl]", "[{path: x, format: hhh}]"),
        "5:29",
        "did you mean 'hh'",
    ),
    "tab": (GOOD.replace("  output_dir", "\toutput_dir"), "7:1", "cannot be indented with tabs"),
    "open bracket": (GOOD + "lora: {r: 8\n", "9:7", "never closed"),
    "open quote": (GOOD + 'lora: "x\n', "9:7", "never closed"),
    "two colons": (GOOD.replace("some/model", "a: b"), "3:24", "unexpected ':'; quote the value"),
    "forbidden character": (GOOD.replace("some/model", "@x"), "3:23", "cannot start with '@'"),
    "bad indentation": (GOOD + " lora: {}\n", "9:2", "indent it like the keys above"),
    "control character": (GOOD.replace("some", "so\x07me"), "3:25", "does not allow"),
    "alias bomb": (BILLION, "1:4", "anchors (&a) are not supported"),
    "alias": (GOOD + "lora: *base\n", "9:7", "aliases (*base) are not supported"),
    "merge key": (
        GOOD.replace("  output_dir", "  <<: {seed: 1}\n  output_dir"),
        "7:3",
        "merge keys (<<) are not supported",
    ),
    "python tag": (GOOD.replace("some/model", "!!python/name:os.system x"), "3:23", "tags ("),
    "second document": (GOOD + "---\nmethod: dpo\n", "9:1", "a recipe is a single document"),
    "bottomless nesting": (DEEP, "9:27", "nested more than 20 levels"),
    "a list": ("- 1\n", "1:1", "got a list"),
    "empty file": ("# nothing\n", "1:1", "got nothing"),
    "key that is a list": (GOOD + "? [a]\n: 1\n", "9:3", "a key must be plain text"),
    "endless number": (with_lines(f"seed: {'9' * 5000}"), "7:9", "too many digits"),
    "TRL file": (
        "model_name_or_path: gpt2\ndataset_name: x\nlearning_rate: 1e-6\nbeta: 0.1\n",
        "1:1",
        "this is a config of TRL, not a recipe; `dpoctl import bad.yaml` makes a recipe of it",
    ),
    "axolotl file": (
        "base_model: gpt2\nrl: dpo\nsequence_len: 512\nmicro_batch_size: 2\nlora_r: 8\n",
        "1:1",
        "this is a config of axolotl",
    ),
    "LLaMA-Factory file": (
        "### model\nmodel_name_or_path: x\nstage: dpo\nfinetuning_type: lora\ncutoff_len: 512\n",
        "3:1",
        "this is a config of LLaMA-Factory",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_refused_with_its_place_and_a_way_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, place, said = WRONG[name]
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["dpoctl", "dpo", "bad.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if ": error: " in line]
    assert any(line.startswith(f"bad.yaml:{place}: error: ") and said in line for line in errors), err
    assert "Traceback" not in err
    assert all(re.match(r"bad\.yaml:\d+:\d+: error: ", line) for line in errors)


def test_the_good_recipe_is_good() -> None:
    assert parse_recipe(GOOD, "good.yaml", command="dpo").training.learning_rate == 5e-7


REFUSED = {
    "a recipe": (("warmup_ration: 0.1",), 2, "bad.yaml:7:3: error: unknown key 'warmup_ration', did you mean"),
    "data that are not there": ((), 3, "error: pairs.jsonl: cannot be read: No such file or directory"),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_refusal_from_the_shell_takes_less_than_a_second_and_no_torch(
    why: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    lines, code, said = REFUSED[why]
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(with_lines(*lines), encoding="utf-8")
    hook = "import sys, atexit; atexit.register(lambda: print('TORCH', 'torch' in sys.modules))"
    (tmp_path / "sitecustomize.py").write_text(hook, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "dpoctl", "dpo", str(recipe), *options]
    before = cpu_of_children()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == code
    assert done.stdout == "TORCH False\n"
    assert said in done.stderr
    assert cpu_of_children() - before < 1


def cpu_of_children() -> float:
    """Seconds that processes have taken, whatever else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_all_errors_are_said_at_once_and_in_the_order_of_the_file() -> None:
    text = with_lines("sed: 1", "optim: sgd", "warmup_ratio: 2", "eval_steps: 3")
    with pytest.raises(RecipeError) as refused:
        parse_recipe(text, "r", command="dpo", overrides=["lora.r=x", "nonsense"])
    assert [str(problem.place) for problem in refused.value.problems] == [
        "r:7:3",
        "r:8:10",
        "r:9:17",
        "r:10:3",
        "--set #1",
        "--set #2",
    ]


def test_the_source_line_is_shown_with_a_caret() -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(GOOD.replace("5e-7", "fast"), "r", command="dpo")
    assert str(refused.value).splitlines()[1:] == ["    8 |   learning_rate: fast", f"      | {' ' * 17}^"]


@pytest.mark.parametrize("value", ["&a 1", "*a", "!!int 1", ".nan", '"\\0"'])
def test_a_value_that_yaml_reading_refuses_is_not_also_of_the_wrong_type(value: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(GOOD.replace("runs/x", value), "r", command="dpo")
    assert len(refused.value.problems) == 1


def test_a_misspelt_section_is_not_also_missing() -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(GOOD.replace("training:", "trainning:"), "r", command="dpo")
    assert [problem.message for problem in refused.value.problems] == [
        "unknown key 'trainning', did you mean 'training'?"
    ]


def test_a_misspelt_section_causes_no_follow_up_error() -> None:
    text = GOOD + "quantization: {load_in_4bit: true}\nlroa: {r: 8}\n"
    with pytest.raises(RecipeError) as refused:
        parse_recipe(text, "r", command="dpo")
    assert len(refused.value.problems) == 1


def test_thousands_of_errors_are_cut_short() -> None:
    text = GOOD + "".join(f"key{i}: 1\n" for i in range(2000))
    with pytest.raises(RecipeError) as refused:
        parse_recipe(text, "r", command="dpo")
    assert str(refused.value).endswith("and 1950 more")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"method: \xff\n", "r.yaml:1:9: error: not UTF-8"),
        (b"x" * (2**20 + 1), "r.yaml:1:1: error: larger than 1 MiB"),
    ],
)
def test_a_file_that_cannot_be_a_recipe_is_refused(
    raw: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_bytes(raw)
    monkeypatch.setattr(sys, "argv", ["dpoctl", "dpo", "r.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("recipes/mistral.yml", "did you mean 'recipes/mistral7b.yaml'?"),
        ("mistral7b", "did you mean 'recipes/mistral7b.yaml'?"),
        ("recipes", "is a folder"),
        ("qqqqqqqq.yaml", "`dpoctl recipes` lists those"),
        ("recipes/gpt2-smoke.yaml", "`dpoctl recipes copy gpt2-smoke` copies"),
    ],
)
def test_a_missing_file_names_the_nearest(
    asked: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/mistral7b.yaml").write_text(GOOD, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["dpoctl", "dpo", asked])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


FOREIGN = {
    "packing: true": "unknown key 'packing': dpoctl does not pad, so it needs no packing; remove this key",
    "sample_packing: true": "unknown key 'sample_packing': dpoctl does not pad, so it needs no packing; remove",
    "load_best_model_at_end: true": "the model of the last step is the result; training.max_steps ends a run earlier",
    "neftune_noise_alpha: 5": "unknown key 'neftune_noise_alpha', did you mean 'sft.neftune_noise_alpha'?",
    "deepspeed: ds.json": "did you mean 'sharding'? (full: weights, gradients and optimizer state are divided",
    "fsdp: full_shard auto_wrap": "did you mean 'sharding'? (full: weights, gradients and optimizer state are divided",
    "fsdp_config: {fsdp_version: 2}": "did you mean 'sharding'?",
    "tensor_parallel_size: 2": "a layer is computed on one device; training.sharding: full divides",
    "dataloader_num_workers: 4": "rows are tokenized once and kept in a cache; no workers are needed",
    "use_liger_kernel: true": "fused kernels are used where the model allows; there is nothing to set",
    "gradient_accumulation_steps: 4": "did you mean 'global_batch_size'? (it counts the rows of a step over",
    "bf16: true": "did you mean 'model.dtype'? (for example dtype: bfloat16)",
    "optim: adamw_apex_fused": "got 'adamw_apex_fused', did you mean 'adamw'?",
    "optim: rmsprop_bnb": "did you mean 'rmsprop'?",
    "lr_scheduler_type: reduce_lr_on_plateau": "the learning rate is a function of the step alone",
    "lr_scheduler_type: wsd": "did you mean 'warmup_stable_decay'?",
    "min_lr_rate: 0.1": "it is an argument of the schedule: set it in training.lr_scheduler_kwargs",
}


@pytest.mark.parametrize("line", FOREIGN)
def test_a_key_or_value_of_another_tool_is_answered_in_one_short_line(line: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(with_lines(line), "r.yaml", command="dpo")
    (problem,) = refused.value.problems
    assert FOREIGN[line] in problem.message
    assert len(str(problem)) < 200


def test_the_keys_of_a_section_are_listed_once() -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(with_lines("zzzz: 1", "yyyy: 2"), "r.yaml", command="dpo")
    first, second = (problem.message for problem in refused.value.problems)
    assert first.startswith("unknown key 'zzzz'; the keys of training are output_dir, ")
    assert second == "unknown key 'yyyy' of training"


def test_no_key_of_another_tool_is_a_key_here_or_translated_too() -> None:
    ours = {str(path[-1]) for path in known_paths()}
    assert not NOT_OFFERED_WHY.keys() & (KEYS.keys() | ours)
    assert len(NOT_OFFERED_WHY) == sum(map(len, NOT_OFFERED.values())), "no key is in two places"
    for key, values in VALUES.items():
        (path,) = (path for path in known_paths() if path[-1] == key)
        field = field_at(Recipe, path)
        assert field is not None
        assert {ours for ours, _ in values.values()} <= {*choices(field.annotation)}


SECRET = "hf_AbCdEfGhIjKlMnOp"


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("line", "overrides"),
    [
        (f"hub_token: {SECRET}", []),
        (f'"{SECRET}": 1', []),
        (f"optim: {SECRET}", []),
        ("report_to: https://me:AbCdEfGhIjKlMnOp@tracker", []),
        ("wandb_api_key: AbCdEfGhIjKlMnOp", []),
        ("seed: 1", [f"hub_token={SECRET}"]),
        ("seed: 1", [SECRET]),
        ("seed: 1", ["my_password=AbCdEfGhIjKlMnOp"]),
        ("seed: 1", ["dtype=https://me:AbCdEfGhIjKlMnOp@hub/model"]),
        ("seed: 1", ["train=https://me:AbCdEfGhIjKlMnOp@hub/rows.jsonl"]),
    ],
)
def test_no_secret_of_a_recipe_or_an_override_is_printed(
    line: str,
    overrides: list[str],
    as_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(with_lines(line))
    for command in ("dpo", "check"):
        given = [word for override in overrides for word in ("--set", override)]
        monkeypatch.setattr(sys, "argv", ["dpoctl", command, "r.yaml", *given, *["--json"] * as_json])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code in (2, 3)
        assert "AbCdEfGhIjKlMnOp" not in out + err
        assert "<redacted>" in out + err or as_json or command == "check"
