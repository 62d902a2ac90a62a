"""Advice that a recipe deserves, losses among it: each finding from a recipe that makes it, at the line of its key."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from advice_samples import FULL, GOOD, SCRATCH, SFT, examine, findings, rate, told, training

from dpoctl.losses import LOSSES
from dpoctl.recipe.advice import advise, count_severities, show_warnings
from dpoctl.recipe.diagnostics import Diagnostic
from dpoctl.recipe.facts import AnswerLengths, Facts, PlannedRun, RowCounts

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
# A specification of data to make stands there too.
SHIPPED = [file for file in RECIPES if "training" in yaml.safe_load(file.read_text(encoding="utf-8"))]
# name: (recipe, code, grade, line, a piece of the message)
ADVICE = {
    "a rate far too high for LoRA": (rate(GOOD, "5e-4"), "lr-high-lora", "warning", 10, "5e-4 is high for preferences"),
    "a rate too high for all weights": (rate(FULL, "2e-5"), "lr-high-full", "warning", 10, "of 7 B parameters"),
    "a rate too high for SFT with LoRA": (rate(SFT, "2e-3"), "lr-high-lora", "warning", 10, "high for SFT with LoRA"),
    "a rate that suits LoRA, for all weights": (
        rate(SFT.replace("lora: {r: 16}", "#"), "2e-4"), "lr-high-full", "warning", 10, "above 1e-4",
    ),
    "a high rate for a model of unknown size": (
        rate(FULL.replace("-7b", ""), "2e-5"), "lr-high-full", "note", 10, "of a large model",
    ),
    "a rate that is too high for any size": (
        rate(FULL.replace("-7b", ""), "1e-3"), "lr-high-full", "warning", 10, "of a large model",
    ),
    "a rate too high for a new model": (
        rate(SFT.replace("lora: {r: 16}", "#").replace("{model_name_or_path: some/model-7b}", SCRATCH), "0.1"),
        "lr-high-full", "warning", 10, "above 0.01",
    ),
    "a rate too low for LoRA": (
        rate(GOOD, "5e-7"), "lr-low", "warning", 10, "the adapter hardly changes; the usual range is 5e-6 to 5e-5",
    ),
    "a rate of nothing": (rate(GOOD, "0"), "lr-zero", "warning", 10, "the model learns nothing"),
    "many epochs": (
        training(GOOD, "num_train_epochs: 20"), "epochs", "warning", 13, "num_train_epochs 20: after 3 epochs",
    ),
    "many epochs by the number of steps": (
        training(GOOD, "max_steps: 2000"), "epochs", "warning", 13, "over at most 5,000 rows is 25.6 epochs or more",
    ),
    "many epochs of SFT": (training(SFT, "num_train_epochs: 6"), "epochs", "warning", 13, "after 5 epochs"),
    "half a run of warm-up": (
        training(GOOD, "max_steps: 200", "warmup_steps: 100"), "warmup", "warning", 14, "50% of the run is warm-up",
    ),
    "a large share of warm-up": (training(GOOD, "warmup_ratio: 0.3"), "warmup", "warning", 13, "30% of the run"),
    "nothing but warm-up": (
        training(GOOD, "max_steps: 100", "warmup_steps: 100"), "warmup", "warning", 14, "is never reached",
    ),
    "no eval data": (
        GOOD.replace("  eval: [{path: heldout.jsonl, max_samples: 2000}]\n", "").replace("  eval_steps: 10\n", ""),
        "no-eval", "warning", 4, "nothing shows whether training helps",
    ),
    "an evaluation that never comes": (
        training(GOOD.replace("eval_steps: 10", "eval_steps: 500"), "max_steps: 200"),
        "eval-rare", "warning", 11, "before and after training, but never during it",
    ),
    "a small eval set": (GOOD.replace("2000", "100"), "eval-small", "note", 6, "up to 5.0 points"),
    "a tiny eval set": (GOOD.replace("2000", "20"), "eval-small", "warning", 6, "up to 11.2 points"),
    "a small number held out": (
        GOOD.replace("eval: [{path: heldout.jsonl, max_samples: 2000}]", "eval_size: 100"),
        "eval-small", "note", 6, "eval set 'eval' has 100 pairs",
    ),
    "nothing saved on the way": (
        training(GOOD.replace("  save_steps: 100\n", ""), "max_steps: 200"), "no-checkpoint", "warning", 9,
        "an interrupted run is lost",
    ),
    "nothing saved before the end": (
        training(GOOD.replace("save_steps: 100", "save_steps: 200"), "max_steps: 200"),
        "no-checkpoint", "warning", 12, "there is no checkpoint before the end of 200 steps",
    ),
    "dropout that does nothing": (
        GOOD.replace("{r: 16}", "{lora_dropout: 0.05}"), "lora-dropout", "warning", 3,
        "has no effect, because model.disable_dropout is true",
    ),
    "a beta for means": (GOOD.replace("0.1", "5.0"), "beta-high", "warning", 7, "rewards are sums"),
    "a beta that lets go": (GOOD.replace("0.1", "0.001"), "beta-low", "warning", 7, "keeps the policy closer"),
    "a beta of sums for a loss of means": (
        GOOD.replace("beta: 0.1", "type: simpo, beta: 0.1"), "beta-low", "warning", 7, "rewards are means over",
    ),
    "a beta of means for a loss of sums": (
        GOOD.replace("beta: 0.1", "type: kto, beta: 2.0"), "beta-high", "warning", 7, "the usual range is 0.01 to 0.5",
    ),
    "a beta for DPO in SPPO": (
        GOOD.replace("beta: 0.1", "type: sppo_hard, beta: 0.1"), "beta-high", "warning", 7,
        "the usual range is 0.0005 to 0.005",
    ),
    "a beta for DPO around SimPO": (
        GOOD.replace("beta: 0.1", "type: beta_dpo, base: simpo"), "beta-low", "warning", 7, "for the loss 'simpo'",
    ),
    "a beta in a list": (
        GOOD.replace("loss: {beta: 0.1}", "loss: [{type: ipo}, {type: apo_zero, beta: 5.0}]"),
        "beta-high", "warning", 7, "for the loss 'apo_zero'",
    ),
    "a rate of DPO for SimPO": (
        rate(FULL, "4e-6").replace("beta: 0.1", "type: simpo"), "lr-high-full", "warning", 10,
        "for simpo with full fine-tuning of 7 B parameters: above 2e-6 answers often degrade; "
        "the usual range for large models is 3e-7 to 1e-6",
    ),
    "a rate too high even for ORPO": (
        rate(FULL, "3e-5").replace("beta: 0.1", "type: orpo"), "lr-high-full", "warning", 10,
        "the usual range for large models is 5e-6 to 8e-6",
    ),
    "preferences from scratch": (
        FULL.replace("{model_name_or_path: some/model-7b}", SCRATCH), "dpo-from-scratch", "warning", 2, "dpoctl sft",
    ),
    "the reference a second time": (
        GOOD.replace("{loss: {beta: 0.1}}", "{reference: {path: some/model-7b}}"),
        "reference-twice", "warning", 7, "remove the key to avoid a second copy",
    ),
    "another reference": (
        GOOD.replace("{loss: {beta: 0.1}}", "{reference: {path: other}}"), "reference-other", "note", 7, "not checked",
    ),
    "training on the test split": (
        GOOD.replace("max_samples: 5000", "split: test_prefs"), "train-on-test", "warning", 5, "'test_prefs' of pairs",
    ),
    "training on a benchmark": (
        GOOD.replace("pairs.jsonl", "allenai/reward-bench"), "train-on-test", "warning", 5, "is a benchmark",
    ),
    "measuring on what was trained on": (
        GOOD.replace("heldout.jsonl", "pairs.jsonl"), "eval-is-train", "warning", 5, "results will be too good",
    ),
}  # fmt: skip


def line_of(found: Diagnostic) -> int:
    assert found.place
    return found.place.line


@pytest.mark.parametrize("text", [GOOD, SFT, rate(FULL, "5e-7")], ids=["lora", "sft", "full"])
def test_there_is_nothing_to_say_against_a_good_recipe(text: str) -> None:
    assert findings(text) == []


@pytest.mark.parametrize("name", ADVICE)
def test_advice_stands_at_the_line_of_its_key_in_plain_words(name: str) -> None:
    text, code, grade, line, said = ADVICE[name]
    (found,) = [one for one in findings(text) if one.code == code]
    assert (found.severity, line_of(found)) == (grade, line), str(found)
    assert said in found.message
    assert str(found).startswith(f"r.yaml:{line}:")
    assert f": {grade}: " in str(found)
    assert "\n" not in str(found)


# Published settings, which are shipped as they are.
PUBLISHED = {
    "neuralhermes-dpo-qlora": ["warmup"],
    "smollm2-135m-sft": ["lr-high-full"],
    "smollm2-1.7b-sft": ["lr-high-full"],
}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_the_shipped_recipes_have_no_errors_and_no_warnings(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert [one.code for one in findings(text) if one.severity != "note"] == PUBLISHED.get(file.stem, [])


REVIEWER2 = """\
method: dpo
model: {model_name_or_path: TinyLlama/TinyLlama-1.1B-Chat-v1.0}
lora:
  r: 8
  lora_alpha: 16
  lora_dropout: 0.05
data:
  train: [{path: shionhonda/reviewer2-1k-paired, max_samples: 1000}]
  eval: [{path: shionhonda/reviewer2-1k-paired, split: validation, max_samples: 100}]
  max_prompt_length: 256
  max_length: 128
dpo: {loss: {type: sigmoid, beta: 0.1}}
training:
  output_dir: runs/reviewer2
  learning_rate: 5e-4
  lr_scheduler_type: cosine
  optim: paged_adamw_32bit
  global_batch_size: 10
  max_steps: 2000
  eval_steps: 100
"""


def test_the_reviewers_settings_are_answered_with_an_error_and_the_warnings_that_explain_its_curves() -> None:
    found = findings(REVIEWER2)
    assert [(line_of(one), one.severity, one.code) for one in found] == [
        (6, "warning", "lora-dropout"),
        (9, "note", "eval-small"),
        (10, "error", "recipe"),
        (14, "warning", "no-checkpoint"),
        (15, "warning", "lr-high-lora"),
        (19, "warning", "epochs"),
    ]
    said = {one.code: one.message for one in found}
    assert said["recipe"].startswith("max_prompt_length (256) must be smaller than max_length (128)")
    assert "2,000 x global_batch_size 10 over at most 1,000 rows is 20 epochs" in said["epochs"]
    assert "100 pairs" in said["eval-small"]
    assert "5.0 points" in said["eval-small"]
    assert "learning_rate 5e-4 is high for preferences with LoRA: above 1e-4" in said["lr-high-lora"]


NEURAL_HERMES = """\
method: dpo
model: {model_name_or_path: mistralai/Mixtral-8x7B-v0.1, chat_template: chatml}
quantization: {load_in_4bit: true}
lora:
  r: 16
  lora_alpha: 16
  lora_dropout: 0.05
  target_modules: [k_proj, gate_proj, v_proj, up_proj, q_proj, o_proj, down_proj]
data:
  train: [comparison_gpt4_data_zh.json]
  max_prompt_length: 1024
  max_length: 1536
training:
  output_dir: runs/hermes
  learning_rate: 5e-5
  global_batch_size: 16
  max_steps: 200
  warmup_steps: 100
  logging_steps: 1
  optim: paged_adamw_32bit
"""


def test_the_blogs_settings_are_answered_with_its_warm_up_and_what_is_never_saved_or_measured() -> None:
    assert [(line_of(one), one.code) for one in findings(NEURAL_HERMES)] == [
        (7, "lora-dropout"),
        (9, "no-eval"),
        (14, "no-checkpoint"),
        (18, "warmup"),
    ]
    unmatched = findings(NEURAL_HERMES, unmatched_targets=("gate_proj", "up_proj"), linear_layers=("q_proj", "w1"))
    (targets,) = [one for one in unmatched if one.code == "targets"]
    assert line_of(targets) == 8
    assert "lora.target_modules gate_proj, up_proj match no layer of the model; its linear layers are q_proj, w1" in (
        targets.message
    )


def test_an_eval_set_that_no_step_evaluates_is_an_error_among_the_others() -> None:
    with_eval = NEURAL_HERMES.replace("  max_prompt", "  eval: [heldout.json]\n  max_prompt")
    (error,) = [one for one in findings(with_eval) if one.severity == "error"]
    assert line_of(error) == 11
    assert "needs training.eval_steps" in error.message


def test_an_option_without_effect_is_an_error_among_the_others() -> None:
    found = findings(GOOD.replace("beta: 0.1", "type: ipo, label_smoothing: 0.1"))
    assert [(one.severity, line_of(one)) for one in found] == [("error", 7)]
    assert "the loss 'ipo' has no 'label_smoothing'" in found[0].message


FACTS = {
    "rows seen": (training(GOOD, "max_steps: 2000"), {"rows": 1000}, "epochs", "over 1,000 rows is 128 epochs:"),
    "few steps": (
        GOOD, {"rows": 100}, "few-steps", "the run has only 2 optimizer steps (100 rows, global_batch_size 64)",
    ),
    "warm-up of a run of known length": (training(GOOD, "warmup_steps: 10"), {"rows": 640}, "warmup", "never reached"),
    "eval rows seen": (GOOD, {"eval_rows": {"eval": 100}}, "eval-small", "5.0 points"),
    "eval rows held out": (
        GOOD.replace("eval: [{path: heldout.jsonl, max_samples: 2000}]", "eval_size: 0.1"),
        {"eval_rows": {"eval": 64}}, "eval-small", "6.2 points",
    ),
    "a long run": (GOOD.replace("  save_steps: 100\n", ""), {"rows": 64_000}, "no-checkpoint", "1,000 steps"),
    "rows dropped for their length": (
        GOOD, {"rows": 700, "train": RowCounts(used=700, dropped={"too_long": 250, "no_pair": 50})}, "rows-dropped",
        "30% of the training rows are dropped: 250 too_long, 50 no_pair",
    ),
    "eval rows dropped for their length": (
        GOOD, {"evals": {"eval": RowCounts(used=59, dropped={"too_long": 241})}}, "rows-dropped",
        "80% of the rows of eval set 'eval' are dropped: 241 too_long",
    ),
    "answers cut": (
        GOOD, {"rows": 700, "train": RowCounts(used=700, unfinished=70)}, "answers-cut", "10% of the training rows",
    ),
    "eval answers cut": (
        GOOD, {"evals": {"eval": RowCounts(used=70, unfinished=7)}}, "answers-cut",
        "10% of the rows of eval set 'eval' have an answer that is truncated at max_length 1,024: their ends are not",
    ),
    "chosen answers are longer": (
        GOOD, {"lengths": AnswerLengths(pairs=900, chosen=90.0, rejected=30.0, gap_error=2.0)}, "length-decides",
        "3.0 times as long as rejected ones (90 and 30 tokens on average over 900 pairs)",
    ),
    "rows rendered before": (
        GOOD, {"looked_at": 200, "rendered": 200}, "rendered-rows", "would be applied a second time",
    ),
    "rows rendered in parts": (
        GOOD, {"looked_at": 200, "doubled": 200}, "rendered-twice", "rows start a conversation twice",
    ),
    "control tokens in pieces": (
        GOOD, {"split_tokens": ("<|im_start|>",), "ends_turns": False}, "control-tokens", "several tokens each",
    ),
    "rows longer than the model reads": (
        GOOD, {"context_length": 512}, "context", "max_length 1,024 is more than the context length of the model, 512",
    ),
    "quantiles of few rows": (
        training(GOOD, "global_batch_size: 24"), {"coupling": ("aot",)}, "statistics-batch",
        "its statistics are over the 24 rows of a step",
    ),
    "rows of one label": (
        GOOD.replace("beta: 0.1", "type: kto"), {"labels": (0, 900)}, "one-label", "every training row is undesirable",
    ),
    "statistics over few rows": (
        training(GOOD, "global_batch_size: 4"), {"coupling": ("aot",)}, "statistics-batch",
        "its statistics are over the 4 rows of a step",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_what_was_seen_of_data_and_model_makes_warnings_that_a_recipe_alone_does_not(name: str) -> None:
    text, facts, code, said = FACTS[name]
    assert code not in {one.code for one in findings(text) if one.severity == "warning"} or code in (
        "epochs",
        "eval-small",
    )
    (found,) = [one for one in findings(text, **facts) if one.code == code]
    assert said in found.message
    assert found.severity == ("note" if code == "eval-small" else "warning")


@pytest.mark.parametrize(
    ("text", "chosen", "error"),
    [
        (GOOD, 90.0, 24.0),
        (GOOD, 42.0, 1.0),
        (GOOD.replace("beta: 0.1", "type: r_dpo"), 90.0, 2.0),
        (GOOD, 28.0, 2.0),
    ],
    ids=["chance", "a little longer", "a loss that corrects for length", "shorter"],
)
def test_lengths_that_do_not_decide_are_not_told(text: str, chosen: float, error: float) -> None:
    lengths = AnswerLengths(pairs=9, chosen=chosen, rejected=30.0, gap_error=error)
    assert "length-decides" not in {one.code for one in findings(text, lengths=lengths)}


def test_a_rate_is_measured_by_the_size_of_the_model_as_it_is() -> None:
    small = rate(FULL, "5e-5")
    assert ("warning", "lr-high-full") in told(findings(small))
    assert told(findings(small, parameters=1_100_000)) == set()
    assert ("warning", "lr-high-full") in told(findings(rate(FULL, "5e-4"), parameters=1_100_000))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.1e9),
        ("alignment-handbook/zephyr-7b-sft-qlora", 7e9),
        ("EleutherAI/pythia-410m", 4.1e8),
        ("models/8b/mine-4bit/", None),
        ("gpt2", None),
    ],
)
def test_the_size_of_a_model_is_read_off_its_name(name: str, size: float | None) -> None:
    recipe = examine(GOOD.replace("some/model-7b", name)).accept()
    assert PlannedRun(recipe, Facts()).parameters == size


def test_a_template_whose_turns_end_with_a_known_token_is_only_noted() -> None:
    assert told(findings(GOOD, split_tokens=("<|user|>",))) == {("note", "control-tokens")}


def test_what_stands_in_for_a_wrong_value_gets_no_advice() -> None:
    found = findings(rate(GOOD, "fast").replace("eval_steps: 10", "eval_steps: none"))
    assert {one.severity for one in found} == {"error"}


def test_an_override_is_named_instead_of_a_line() -> None:
    (found,) = findings(GOOD, "learning_rate=5e-4")
    assert str(found).startswith("--set #1: warning: learning_rate 5e-4")
    assert found.to_dict()["line"] is None
    assert found.to_dict()["override"] == 1


def test_a_recipe_without_a_file_gets_its_advice_by_key() -> None:
    found = advise(examine(rate(GOOD, "5e-4")).recipe)
    assert str(found[0]).startswith("training.learning_rate: warning: learning_rate 5e-4 is high")


def test_troubles_of_looking_stand_at_their_keys_in_the_order_of_the_file() -> None:
    trouble = Diagnostic("note", "not-seen", ("model", "model_name_or_path"), "the model was not looked at")
    found = findings(rate(GOOD, "5e-4"), diagnostics=(trouble,))
    assert [(line_of(one), one.code) for one in found] == [(2, "not-seen"), (10, "lr-high-lora")]
    assert count_severities(found) == {"error": 0, "warning": 1, "note": 1}


def test_a_run_prints_warnings_and_keeps_notes_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    show_warnings(findings(rate(GOOD, "5e-4").replace("2000", "100")))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("r.yaml:10:3: warning: learning_rate 5e-4")


def test_advice_needs_no_model_library() -> None:
    script = "import sys, dpoctl.recipe.advice; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_loss_that_couples_the_batch_says_over_how_many_rows() -> None:
    text = GOOD.replace("beta: 0.1", "type: beta_dpo")
    (found,) = findings(text, coupling=("beta_dpo",))
    assert (found.severity, found.code) == ("note", "statistics-batch")
    assert "the loss 'beta_dpo' compares" in found.message
    assert "64 rows of a step, on any number of devices" in found.message


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_is_warned_of_its_own_defaults(name: str) -> None:
    assert findings(GOOD.replace("beta: 0.1", f"type: {name}")) == []


def test_the_usual_rate_of_orpo_is_not_too_high_for_it() -> None:
    text = rate(FULL, "8e-6")
    assert told(findings(text)) == {("warning", "lr-high-full")}
    assert told(findings(text.replace("beta: 0.1", "type: orpo"))) == set()


@pytest.mark.parametrize(
    ("labels", "weights", "said"),
    [
        ((300, 300), "", None),
        ((400, 300), "", None),
        ((300, 600), "", "300 desirable and 600 undesirable rows have a total weight of 300 and 600; the KTO paper"),
        ((300, 600), "", "e.g. with desirable_weight: 2"),
        ((800, 300), "", "e.g. with undesirable_weight: 2"),
        ((300, 600), ", desirable_weight: 2.0", None),
        ((800, 300), ", undesirable_weight: 2.0", None),
        ((400, 300), ", desirable_weight: 3.0", "total weight of 1,200 and 300"),
    ],
)
def test_labels_that_outweigh_one_another_are_noted_with_the_weight_that_levels_them(
    labels: tuple[int, int], weights: str, said: str | None
) -> None:
    found = findings(GOOD.replace("beta: 0.1", f"type: kto{weights}"), labels=labels)
    assert told(found) == ({("note", "kto-balance")} if said else set())
    assert all(str(said) in one.message and line_of(one) == 7 for one in found)


def test_the_meaning_of_beta_is_told_where_the_loss_is_documented() -> None:
    assert "higher beta keeps the policy closer" in (LOSSES["sigmoid"].__doc__ or "")
