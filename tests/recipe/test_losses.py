"""`dpo.loss`: one loss or several, each wrong one refused in one line at its key, in words that lead on."""

from collections.abc import Sequence

import pytest

from dpoctl.core.losses import LOSSES
from dpoctl.data.formats import FORMATS
from dpoctl.recipe import RecipeError, parse_recipe
from dpoctl.recipe.checks import ROWS
from dpoctl.recipe.foreign import CONVERSIONS, KEYS, LOSS_NAMES
from dpoctl.recipe.loss import hyperparameters

GOOD = """\
method: dpo
model: {model_name_or_path: some/model}
data:
  train: [pairs.jsonl]
training: {output_dir: runs/x, learning_rate: 5e-7}
dpo:
  loss: """
LIST = "[{type: sigmoid}, {type: hinge}]"


def refusals(loss: str, rest: str = "", overrides: Sequence[str] = (), good: str = GOOD) -> list[tuple[str, str]]:
    """Place and message of everything that is wrong with a recipe of this loss."""
    with pytest.raises(RecipeError) as refused:
        parse_recipe(f"{good}{loss}\n{rest}", "r", command="dpo", losses=LOSSES, formats=FORMATS, overrides=overrides)
    assert all("\n" not in problem.message for problem in refused.value.problems)
    return [(str(problem.place), problem.message) for problem in refused.value.problems]


# name: (the loss, column in line 7, how the message starts)
WRONG = {
    "no such loss": (
        "{type: quantum}", 16, "dpo.loss.type: unknown name 'quantum', expected one of " + ", ".join(LOSSES),
    ),
    "no such key": ("{type: kto, zzz: 1}", 21, "unknown key 'zzz' of the loss 'kto'; it takes beta, sft_weight, desir"),
    "misspelt key": ("{type: kto, desireable_weight: 1}", 21, "unknown key 'desireable_weight', did you mean 'desirab"),
    "key of one other loss": ("{gamma_beta_ratio: 1}", 10, "the loss 'sigmoid' has no 'gamma_beta_ratio' (simpo has i"),
    "key of the run": ("{learning_rate: 1}", 10, "unknown key 'learning_rate', did you mean 'training.learning_rate'?"),
    "out of range": ("{type: robust, label_smoothing: 0.5}", 41, "dpo.loss.label_smoothing: expected a number of at l"),
    "unknown choice": ("{type: f_dpo, divergence: jss}", 35, "dpo.loss.divergence: expected forward_kl, js or"),
    "what a loss refuses": (
        "{type: f_dpo, alpha: 0.3}", 30, "dpo.loss: alpha does nothing with divergence: js; drop it, or set divergence",
    ),
    "what beta-DPO refuses": (
        "{type: beta_dpo, alpha: 0, filter_ratio: 0}", 33, "dpo.loss: alpha and filter_ratio are both 0, which",
    ),
    "parity with a constant of its own": (
        "{type: beta_dpo, parity: original, beta_max: 1.0}", 34, "dpo.loss.parity: original has its own beta_max",
    ),
    "base of no kind": ("{type: beta_dpo, base: 5}", 32, "dpo.loss.base: expected text or a mapping, got 5"),
    "base that does not exist": ("{type: beta_dpo, base: sigmod}", 32, "dpo.loss.base: expected one of sigmoid, robus"),
    "base that couples": ("{type: beta_dpo, base: {type: aot}}", 32, "dpo.loss.base: expected one of sigmoid, robust"),
    "key of another base": (
        "{type: beta_dpo, base: {type: ipo, gamma_beta_ratio: 1}}", 44, "the loss 'ipo' has no 'gamma_beta_ratio' (sim",
    ),
    "base out of range": (
        "{type: beta_dpo, base: {type: simpo, gamma_beta_ratio: -1}}", 64, "dpo.loss.base.gamma_beta_ratio: expected a",
    ),
    "beta in the base": (
        "{type: beta_dpo, base: {type: simpo, beta: 2.0}}", 52, "dpo.loss.base.beta: beta stands beside base, not in i",
    ),
    "weight of a single loss": ("{type: ipo, weight: 2}", 21, "weight is for the losses of a list"),
    "sft alone": ("{type: sft}", 16, "dpo.loss: 'sft' goes with a preference loss, as its sft_weight"),
    "sft alone in a list": ("[{type: sft}]", 9, "dpo.loss: expected a loss of preferences beside sft"),
    "an empty list": ("[]", 9, "dpo.loss: expected a mapping such as {type: sigmoid, beta: 0.1}, or a list of them"),
    "a list of names": ("[ipo, sft]", 9, "dpo.loss: expected a mapping such as"),
    "no type in a list": ("[{beta: 0.1}]", 10, "missing key 'dpo.loss[0].type', one of sigmoid, robust"),
    "no such loss in a list": ("[{type: ipo}, {type: stf}]", 30, "dpo.loss[1].type: unknown name 'stf', did"),
    "a weight of nothing": ("[{type: ipo, weight: 0}, {type: sft}]", 30, "dpo.loss[0].weight: expected a number above"),
    "a key of sft": ("[{type: ipo}, {type: sft, beta: 1.0}]", 35, "the loss 'sft' has no 'beta' (sigmoid, robust, "),
    "the same twice": ("[{type: ipo}, {type: ipo, weight: 2}]", 23, "'ipo' is in the list already"),
    "sft twice": (
        "[{type: ipo, sft_weight: 0.2}, {type: sft}]", 40, "'ipo' has sft_weight 0.2, which is the same term; drop one",
    ),
    "sft beside one that has it": ("[{type: cpo}, {type: sft}]", 23, "'cpo' has sft_weight 1, which is the same term"),
    "losses of different rows": (
        "[{type: ipo}, {type: kto}]", 23, "'kto' judges labels, and 'ipo' judges pairs; losses of a list judge the sam",
    ),
    "a name of others": ("{type: kto_pair}", 16, "dpo.loss.type: unknown name 'kto_pair', did you mean 'kto'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_is_refused_in_one_line_at_its_key(name: str) -> None:
    loss, column, said = WRONG[name]
    ((place, message),) = refusals(loss)
    assert (place, message[: len(said)]) == (f"r:7:{column}", said)


@pytest.mark.parametrize(("theirs", "ours"), LOSS_NAMES.items())
def test_another_tools_name_of_a_loss_is_answered_with_ours(theirs: str, ours: str) -> None:
    assert ours in LOSSES
    assert theirs not in LOSSES
    ((_, message),) = refusals(f"{{type: {theirs}}}")
    assert message.endswith(f"unknown name {theirs!r}, did you mean {ours!r}?")


@pytest.mark.parametrize("name", ["beta_DPO", "IPO", "Plackett-Luce", "simPO"])
def test_another_spelling_of_a_loss_is_answered_with_ours(name: str) -> None:
    ((_, message),) = refusals(f"{{type: {name}}}")
    assert message.endswith(f"did you mean {name.lower().replace('-', '_')!r}?")


THEIRS = {key.removeprefix("dpo.loss."): ours for key, ours in KEYS.items() if ours.startswith("dpo.loss")}


@pytest.mark.parametrize(("theirs", "ours"), [(key, ours) for key, ours in THEIRS.items() if "." not in key])
def test_another_tools_key_of_a_loss_is_answered_with_ours(theirs: str, ours: str) -> None:
    name = ours.removeprefix("dpo.loss").removeprefix(".")
    assert name in ("", "type", *hyperparameters(LOSSES))
    if theirs == name:
        return
    for loss, column in ((f"{{{theirs}: 1}}", 10), (f"[{{type: sigmoid, {theirs}: 1}}]", 26)):
        ((place, message),) = refusals(loss)
        assert place == f"r:7:{column}"
        assert f"unknown key {theirs!r}, did you mean {name or 'dpo.loss'!r}" in message
        assert message.endswith(f"; its value is {CONVERSIONS.get(theirs)}") == (theirs in CONVERSIONS)


def test_the_key_of_another_tool_says_whose_it_is() -> None:
    ((_, message),) = refusals("{rpo_alpha: 1, mode_weight: 0.2}")[1:]
    assert message == "unknown key 'mode_weight', did you mean 'filter_ratio' (beta_dpo has it)?"


def test_a_list_is_overridden_by_its_numbers_and_no_other_way() -> None:
    for override in ("dpo.loss.beta=0.2", "beta=0.2"):
        assert refusals(LIST, overrides=[override]) == [
            ("--set #1", "dpo.loss is a list of 2; say which, e.g. dpo.loss.0.beta")
        ]
    recipe = parse_recipe(GOOD + LIST, "r", command="dpo", losses=LOSSES, overrides=["dpo.loss.1.beta=0.2"])
    assert [spec["beta"] for _, spec in recipe.dpo.losses] == [0.1, 0.2]


def test_sft_beside_a_loss_whose_own_is_switched_off_is_one_term() -> None:
    text = GOOD + "[{type: cpo, sft_weight: 0}, {type: sft, weight: 0.3}]"
    recipe = parse_recipe(text, "r", command="dpo", losses=LOSSES)
    assert [(spec["type"], spec["weight"]) for _, spec in recipe.dpo.losses] == [("cpo", 1.0), ("sft", 0.3)]


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.couples_batch])
def test_a_loss_that_compares_the_rows_of_a_step_needs_more_than_one(name: str) -> None:
    one = GOOD.replace("{output_dir", "{global_batch_size: 1, output_dir")
    for loss in (f"{{type: {name}}}", f"[{{type: {name}}}, {{type: sft}}]"):
        ((place, message),) = refusals(loss, good=one)
        assert place == "r:5:12"
        assert message.startswith(f"the loss {name!r} compares the rows of a step, and global_batch_size: 1 is a step")
    parse_recipe(one + "{type: sigmoid}", "r", command="dpo", losses=LOSSES)


def test_the_reference_of_a_list_is_that_of_any_of_its_losses() -> None:
    for loss, rest, said in (
        ("[{type: simpo}, {type: ipo}]", "{mode: none}", "the loss 'ipo' needs a reference"),
        ("[{type: simpo}, {type: cpo}]", "{path: x}", "path would do nothing: every loss of the list is set to use no"),
        ("{type: beta_dpo, base: simpo, beta: 2}", "{path: x}", "would do nothing: the loss 'beta_dpo' is set to use"),
        ("{type: beta_dpo}", "{mode: none}", "the loss 'beta_dpo' needs a reference"),
    ):
        ((place, message),) = refusals(loss, f"  reference: {rest}\n")
        assert place == "r:8:15"
        assert said in message
    for loss in ("[{type: simpo}, {type: cpo}]", "{type: orpo}"):
        parse_recipe(f"{GOOD}{loss}\n  reference: {{mode: none}}\n", "r", command="dpo", losses=LOSSES)


@pytest.mark.parametrize(
    ("loss", "format", "said"),
    [
        (
            "kto",
            "hh",
            "judges labelled answers, which rows of format hh are not; convert them with `dpoctl convert-data",
        ),
        ("kto", "trl-explicit", "`dpoctl convert-data --to unpaired`"),
        ("kto", "ranking", "`dpoctl convert-data --to unpaired`"),
        ("plackett_luce", "trl-implicit", "judges rankings of answers, which rows of format trl-implicit are not"),
        ("s_dpo", "prompt-completion", "write them in the format ranking"),
        ("sigmoid", "messages", "judges pairs of answers, which rows of format messages are not"),
    ],
)
def test_rows_that_a_loss_cannot_judge_are_refused_where_their_format_is_named(
    loss: str, format: str, said: str
) -> None:
    explicit = GOOD.replace("[pairs.jsonl]", f"[{{path: x, format: {format}}}]")
    ((place, message),) = refusals(f"{{type: {loss}}}", good=explicit)
    assert place == "r:4:21"
    assert said in message
    parse_recipe(GOOD + f"{{type: {loss}}}", "r", command="dpo", losses=LOSSES, formats=FORMATS)


def test_rows_of_a_named_format_go_with_the_losses_that_judge_such_rows() -> None:
    assert ROWS.keys() <= FORMATS.keys()
    assert {loss.rows for loss in LOSSES.values()} == {rows for kinds in ROWS.values() for rows in kinds}
    for format in set(ROWS) - {"messages"}:
        fitting = next(name for name, loss in LOSSES.items() if loss.rows in ROWS[format])
        text = GOOD.replace("[pairs.jsonl]", f"[{{path: x, format: {format}}}]") + f"{{type: {fitting}}}"
        parse_recipe(text, "r", command="dpo", losses=LOSSES, formats=FORMATS)
