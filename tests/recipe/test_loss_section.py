"""`dpo.loss`: one loss or several, each wrong one refused in one line at its key, in words that lead on."""

from collections.abc import Sequence

import pytest

from dpoctl.data.formats import FORMATS
from dpoctl.losses import LOSSES
from dpoctl.recipe import RecipeError, parse_recipe
from dpoctl.recipe.consistency import FORMAT_ROWS
from dpoctl.recipe.data_section import SOURCE_FORMATS
from dpoctl.recipe.foreign_keys import CONVERSIONS, KEYS, LOSS_NAMES
from dpoctl.recipe.loss_section import hyperparameters

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
        parse_recipe(f"{good}{loss}\n{rest}", "r", command="dpo", overrides=overrides)
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
        "{type: beta_dpo, parity: original, beta_max: 1.0}", 54, "dpo.loss: beta_max cannot be set with parity: orig",
    ),
    "beta above its limit": (
        "{type: beta_dpo, beta: 0.5, beta_max: 0.01}", 32, "dpo.loss: beta (0.5) must be at least beta_min (0.001) a",
    ),
    "beta above its limit, by its default": (
        "{type: beta_dpo, beta_max: 0.01}", 36, "dpo.loss: beta (0.1) must be at least beta_min (0.001) and at most b",
    ),
    "scale without effect": (
        "{type: beta_dpo, alpha: 0, gap_scale: reward}", 47, "dpo.loss: gap_scale has no effect with alpha: 0; remove",
    ),
    "base of no kind": ("{type: beta_dpo, base: 5}", 32, "dpo.loss.base: expected text or a mapping, got 5"),
    "misspelt base": (
        "{type: beta_dpo, base: sigmod}", 32, "dpo.loss.base: unknown name 'sigmod', did you mean 'sigmoid'?",
    ),
    "misspelt type of a base": (
        "{type: beta_dpo, base: {type: ipoo}}", 39, "dpo.loss.base.type: unknown name 'ipoo', did you mean 'ipo'?",
    ),
    "base that does not exist": (
        "{type: beta_dpo, base: quantum}", 32, "dpo.loss.base: unknown name 'quantum', expected one of sigmoid, robust",
    ),
    "base that couples": (
        "{type: beta_dpo, base: {type: aot}}", 39, "dpo.loss.base.type: unknown name 'aot', expected one of sigmoid, ",
    ),
    "list for the type of a base": (
        "{type: beta_dpo, base: {type: [a]}}", 39, "dpo.loss.base.type: unknown name a list, expected one of ",
    ),
    "mapping for the type of a base in a list": (
        "[{type: ipo}, {type: beta_dpo, base: {type: {ipo: 1}}}]", 53, "dpo.loss[1].base.type: unknown name a mapping",
    ),
    "base without a type": (
        "{type: beta_dpo, base: {average: true}}", 32, "missing key 'dpo.loss.base.type', one of sigmoid, robust, ",
    ),
    "key of another base": (
        "{type: beta_dpo, base: {type: ipo, gamma_beta_ratio: 1}}", 44, "the loss 'ipo' has no 'gamma_beta_ratio' (sim",
    ),
    "base out of range": (
        "{type: beta_dpo, base: {type: simpo, gamma_beta_ratio: -1}}", 64, "dpo.loss.base.gamma_beta_ratio: expected a",
    ),
    "beta in the base": (
        "{type: beta_dpo, base: {type: simpo, beta: 2.0}}", 52, "dpo.loss.base.beta: write beta beside base, not insid",
    ),
    "weight of a single loss": ("{type: ipo, weight: 2}", 21, "weight is only for the losses of a list"),
    "sft alone": ("{type: sft}", 16, "dpo.loss: 'sft' alone is not a preference loss; run `dpoctl sft`"),
    "sft alone in a list": ("[{type: sft}]", 9, "dpo.loss: the list has no preference loss; add one"),
    "an empty list": ("[]", 9, "dpo.loss: expected a mapping such as {type: sigmoid, beta: 0.1}, or a list of them"),
    "a list of names": ("[ipo, sft]", 9, "dpo.loss: expected a mapping such as"),
    "no type in a list": ("[{beta: 0.1}]", 10, "missing key 'dpo.loss[0].type', one of sigmoid, robust"),
    "no such loss in a list": ("[{type: ipo}, {type: stf}]", 30, "dpo.loss[1].type: unknown name 'stf', did"),
    "a weight of nothing": ("[{type: ipo, weight: 0}, {type: sft}]", 30, "dpo.loss[0].weight: expected a number above"),
    "a key of sft": ("[{type: ipo}, {type: sft, beta: 1.0}]", 35, "the loss 'sft' has no 'beta' (sigmoid, robust, "),
    "the same twice": ("[{type: ipo}, {type: ipo, weight: 2}]", 23, "'ipo' is in the list twice with the same keys"),
    "sft twice": (
        "[{type: ipo, sft_weight: 0.2}, {type: sft}]", 40, "'ipo' adds this term already (sft_weight 0.2); remove one",
    ),
    "sft beside one that has it": ("[{type: cpo}, {type: sft}]", 23, "'cpo' adds this term already (sft_weight 1)"),
    "losses of different rows": (
        "[{type: ipo}, {type: kto}]", 23, "'kto' needs labels, but 'ipo' needs pairs; all losses of a list must use",
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
    assert name in ("", "type", *hyperparameters())
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
            ("--set #1", "dpo.loss is a list of 2; add an index, e.g. dpo.loss[0].beta")
        ]
    recipe = parse_recipe(GOOD + LIST, "r", command="dpo", overrides=["dpo.loss[1].beta=0.2"])
    assert [spec["beta"] for _, spec in recipe.dpo.losses] == [0.1, 0.2]
    assert recipe == parse_recipe(GOOD + LIST, "r", command="dpo", overrides=["dpo.loss.1.beta=0.2"])


def test_sft_beside_a_loss_whose_own_is_switched_off_is_one_term() -> None:
    text = GOOD + "[{type: cpo, sft_weight: 0}, {type: sft, weight: 0.3}]"
    recipe = parse_recipe(text, "r", command="dpo")
    assert [(spec["type"], spec["weight"]) for _, spec in recipe.dpo.losses] == [("cpo", 1.0), ("sft", 0.3)]


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.couples_batch])
def test_a_loss_that_compares_the_rows_of_a_step_needs_more_than_one(name: str) -> None:
    one = GOOD.replace("{output_dir", "{global_batch_size: 1, output_dir")
    for loss in (f"{{type: {name}}}", f"[{{type: {name}}}, {{type: sft}}]"):
        ((place, message),) = refusals(loss, good=one)
        assert place == "r:5:12"
        assert message.startswith(
            f"the loss {name!r} compares the rows of a step, so global_batch_size must be above 1"
        )
    parse_recipe(one + "{type: sigmoid}", "r", command="dpo")


def test_the_reference_of_a_list_is_that_of_any_of_its_losses() -> None:
    for loss, rest, said in (
        ("[{type: simpo}, {type: ipo}]", "{mode: none}", "needs a reference; set mode: auto, or use another loss"),
        ("{type: sigmoid}", "{mode: none}", "set mode: auto, or set dpo.loss.reference_free: true"),
        ("[{type: simpo}, {type: sigmoid}]", "{mode: none}", "or set dpo.loss[1].reference_free: true"),
        ("[{type: simpo}, {type: cpo}]", "{path: x}", "path has no effect: all losses of the list use no reference"),
        ("{type: beta_dpo, base: simpo, beta: 2}", "{path: x}", "has no effect: the loss 'beta_dpo' uses no reference"),
        ("{type: beta_dpo}", "{mode: none}", "the loss 'beta_dpo' needs a reference"),
    ):
        ((place, message),) = refusals(loss, f"  reference: {rest}\n")
        assert place == "r:8:15"
        assert said in message
    for loss in ("[{type: simpo}, {type: cpo}]", "{type: orpo}"):
        parse_recipe(f"{GOOD}{loss}\n  reference: {{mode: none}}\n", "r", command="dpo")


@pytest.mark.parametrize(
    ("loss", "format", "said"),
    [
        (
            "kto",
            "hh",
            "needs labelled answers, but rows of the format hh have none; convert it with `dpoctl convert-data",
        ),
        ("kto", "trl-explicit", "`dpoctl convert-data --to unpaired`"),
        ("kto", "ranking", "`dpoctl convert-data --to unpaired`"),
        ("plackett_luce", "trl-implicit", "needs rankings of answers, but rows of the format trl-implicit have none"),
        ("s_dpo", "prompt-completion", "use data in the format ranking"),
        ("sigmoid", "messages", "needs pairs of answers, but rows of the format messages have none"),
    ],
)
def test_rows_that_a_loss_cannot_judge_are_refused_where_their_format_is_named(
    loss: str, format: str, said: str
) -> None:
    explicit = GOOD.replace("[pairs.jsonl]", f"[{{path: x, format: {format}}}]")
    ((place, message),) = refusals(f"{{type: {loss}}}", good=explicit)
    assert place == "r:4:21"
    assert said in message
    parse_recipe(GOOD + f"{{type: {loss}}}", "r", command="dpo")


def test_rows_of_a_named_format_go_with_the_losses_that_judge_such_rows() -> None:
    assert FORMAT_ROWS.keys() <= FORMATS.keys()
    assert {loss.rows for loss in LOSSES.values()} == {rows for kinds in FORMAT_ROWS.values() for rows in kinds}
    for format in set(FORMAT_ROWS) - {"messages"}:
        fitting = next(name for name, loss in LOSSES.items() if loss.rows in FORMAT_ROWS[format])
        text = GOOD.replace("[pairs.jsonl]", f"[{{path: x, format: {format}}}]") + f"{{type: {fitting}}}"
        parse_recipe(text, "r", command="dpo")


def test_a_recipe_knows_every_format() -> None:
    assert ("auto", *FORMATS) == SOURCE_FORMATS
