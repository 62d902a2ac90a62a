"""A first recipe from three answers, given by options or on a terminal."""

import json
import os
import pty
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from forked import fork
from format_samples import FIXTURES
from tiny_runs import pair_rows, write_rows

from dpoctl.cli.app import main
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.advice import advise
from dpoctl.recipe.loader import examine_recipe
from dpoctl.recipe.starter import choose_training, gigabytes

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Call `dpoctl init` in an empty folder, without a terminal."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dpoctl", "init", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("data", "gpu", "method", "loss", "adapter"),
    [
        ("hh", "rtx4090", "dpo", "sigmoid", "LoRA"),
        ("orca", "16", "dpo", "sigmoid", "LoRA"),
        ("nectar", "8 GB", "dpo", "sigmoid", "QLoRA"),
        ("llamafactory-kto", "NVIDIA H100", "dpo", "kto", "full"),
        ("messages", "none", "sft", "", "LoRA"),
        ("alpaca", "A100 40GB", "sft", "", "LoRA"),
    ],
)
def test_the_recipe_is_for_the_rows_and_the_gpu_and_there_is_nothing_to_say_against_it(
    call: Call, data: str, gpu: str, method: str, loss: str, adapter: str
) -> None:
    size = "4B" if adapter != "full" else "1.7B"
    options = ("--model", f"Qwen/Qwen3-{size}", "--data", str(FIXTURES[data]), "--gpu", gpu, "-o", "mine.yaml")
    code, out, err = call(*options)
    assert (code, out) == (0, "")
    assert f"mine.yaml: a recipe for `dpoctl {method}`" in err
    text = Path("mine.yaml").read_text(encoding="utf-8")
    recipe = parse_recipe(text, "mine.yaml", command=method)
    assert (recipe.lora is None, recipe.quantization is not None) == (adapter == "full", adapter == "QLoRA")
    assert not loss or recipe.dpo.losses[0][1]["type"] == loss
    assert [source.path for source in recipe.data.train] == [str(FIXTURES[data])]
    examined = examine_recipe(text, "mine.yaml")
    said = [str(one) for one in advise(examined.recipe, examined.document) if one.severity != "note"]
    # The samples of formats have few rows.
    assert [one for one in said if "eval set 'eval' has 1 pair," not in one] == []
    assert text.count("  # ") >= 8


def test_the_data_can_be_used_for_sft_too_and_nothing_is_overwritten(call: Call) -> None:
    given = ("--model", "me/model", "--data", str(FIXTURES["hh"]), "--memory", "24")
    code, out, _ = call(*given, "--method", "sft", "--json")
    assert (code, json.loads(out)) == (0, {"output": "recipe.yaml", "method": "sft", "format": "hh"})
    assert "the name of the model does not say its size" in Path("recipe.yaml").read_text()
    code, _, err = call(*given)
    assert (code, err) == (2, "error: recipe.yaml: exists already; name another file with -o\n")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "there is no terminal to ask on; pass --model, --data, --gpu"),
        (("--model", "x"), "there is no terminal to ask on; pass --data, --gpu"),
        (("--gpu", "abacus"), "'abacus' is no GPU that is known here; give its memory in GB, such as 24, or none"),
        (("--method", "ppo"), "--method: expected sft or dpo, got 'ppo'"),
        (("--method", "dpo", "--data", "messages"), "dpo needs preferences"),
        (("--data", "gone.jsonl"), "gone.jsonl"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_nothing_is_written(
    call: Call, given: tuple[str, ...], said: str
) -> None:
    given = tuple(str(FIXTURES[one]) if one in FIXTURES else one for one in given)
    rest = (
        {"--model": "x", "--data": str(FIXTURES["hh"]), "--gpu": "24"}
        if len(given) > 1 and given[0] != "--model"
        else {}
    )
    more = [word for name, value in rest.items() if name not in given for word in (name, value)]
    code, _, err = call(*given, *more)
    assert code in (2, 3)
    assert said in err
    assert len(err.splitlines()) == 1
    assert not Path("recipe.yaml").exists()


def test_three_questions_are_asked_on_a_terminal(tmp_path: Path) -> None:
    """On a real one: nothing else has an answer to `isatty`."""
    parent, child = pty.openpty()

    def answer() -> None:
        os.chdir(tmp_path)
        for number in (0, 1, 2):
            os.dup2(child, number)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
        sys.argv = ["dpoctl", "init"]
        main()

    pid = fork(answer)
    os.close(child)
    os.write(parent, f"Qwen/Qwen3-0.6B\n{FIXTURES['orca']}\nrtx3090\n".encode())
    said = b""
    while chunk := _read(parent):
        said += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    asked = re.findall(r"Which \w+\?", said.decode())
    assert asked[:3] == ["Which model?", "Which data?", "Which GPU?"]
    recipe = parse_recipe((tmp_path / "recipe.yaml").read_text(), "r", command="dpo")
    assert (recipe.model.model_name_or_path, recipe.lora) == ("Qwen/Qwen3-0.6B", None)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1024)
    except OSError:  # the other side is closed
        return b""


def test_the_training_is_the_most_that_fits_into_seven_tenths_of_the_memory() -> None:
    # 16, 2.2 and 0.8 bytes for each of 8e9 numbers are 128, 17.6 and 6.4 GB.
    assert [choose_training(memory, 8e9)[0] for memory in (183, 182, 26, 25, 10, 9)] == [
        *("full", "LoRA", "LoRA", "QLoRA", "QLoRA", "QLoRA")
    ]
    assert choose_training(9, 8e9)[1] == "8 B parameters do not fit into 9 GB: use several GPUs, or a smaller model"
    assert choose_training(0, 1e8) == ("full", "0.1 B parameters, on a CPU")
    assert [
        gigabytes(text) for text in ("24", "24GB", "1.5 GiB", "L40S", "Tesla T4", "A100-40GB", "GeForce RTX 4090")
    ] == [*(24.0, 24.0, 1.5, 47.7, 15.7, 42.3, 25.2)]


@pytest.mark.parametrize(("rows", "held_out"), [(1, None), (2, 1), (60, 6), (200, 0.05)])
def test_few_rows_are_held_out_by_number(rows: int, held_out: float | None, call: Call, tmp_path: Path) -> None:
    write_rows(tmp_path / "few.jsonl", pair_rows(rows))
    assert call("--model", "x", "--data", "few.jsonl", "--gpu", "none", "-o", "mine.yaml")[0] == 0
    recipe = yaml.safe_load(Path("mine.yaml").read_text())
    assert recipe["data"].get("eval_size") == held_out
    assert ("eval_steps" in recipe["training"]) == (held_out is not None)
