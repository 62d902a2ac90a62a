"""Keys that contradict one another, said at the line of the key to change."""

import pytest

from dpoctl.recipe import RecipeError, parse_recipe

GOOD = """\
method: dpo
model: {model_name_or_path: some/model}
lora: {}
data:
  train: [pairs.jsonl]
  eval: [heldout.jsonl]
training:
  output_dir: runs/x
  learning_rate: 5e-7
  eval_steps: 10
"""
DPO = "dpo: {{loss: {}, reference: {}}}\n"
NO_EVAL = GOOD.replace("  eval: [heldout.jsonl]\n", "").replace("  eval_steps: 10\n", "")

# name: (recipe, line, a piece of the message)
CONTRADICTIONS = {
    "prompt as long as everything": (
        GOOD.replace("  train", "  max_length: 64\n  max_prompt_length: 64\n  train"),
        6,
        "max_prompt_length (64) must be smaller than max_length (64)",
    ),
    "prompt of a source as long as everything": (
        GOOD.replace("[pairs.jsonl]", "\n  - path: pairs.jsonl\n    max_prompt_length: 1024"),
        7,
        "max_prompt_length (1024) must be smaller than max_length (1024)",
    ),
    "source shorter than the prompts of all": (
        GOOD.replace("  train", "  max_prompt_length: 64\n  train").replace(
            "[pairs.jsonl]", "\n  - path: pairs.jsonl\n    max_length: 64"
        ),
        8,
        "max_prompt_length (64) must be smaller than max_length (64)",
    ),
    "end of a prompt that is never cut": (
        GOOD.replace("[pairs.jsonl]", "[{path: pairs.jsonl, prompt_truncation: keep_start}]"),
        5,
        "data.train[0].prompt_truncation has no effect",
    ),
    "end of a prompt that is never cut, in a bare list": (
        GOOD.replace("[heldout.jsonl]", "[{path: h, overlong: drop, prompt_truncation: keep_end}]"),
        6,
        "data.eval.eval[0].prompt_truncation has no effect",
    ),
    "quantised without adapters": (
        GOOD.replace("lora: {}", "quantization: {load_in_4bit: true}"),
        3,
        "load_in_4bit needs a lora section",
    ),
    "8 bit without adapters": (
        GOOD.replace("lora: {}", "quantization: {load_in_8bit: true}"),
        3,
        "load_in_8bit needs a lora section",
    ),
    "4 and 8 bit": (
        GOOD + "quantization: {load_in_4bit: true, load_in_8bit: true}\n",
        11,
        "cannot both be true",
    ),
    "quantisation of nothing": (
        GOOD + "quantization: {}\n",
        11,
        "quantization has no effect; set load_in_4bit or load_in_8bit",
    ),
    "4-bit key in 8 bit": (
        GOOD + "quantization:\n  load_in_8bit: true\n  bnb_4bit_quant_type: nf4\n",
        13,
        "load_in_4bit is not true",
    ),
    "replicas of a model that is not divided": (
        GOOD + "  sharding: none\n  replicas: 2\n",
        12,
        "training.replicas has no effect: sharding: none divides no model",
    ),
    "offloading of a model that is not divided": (
        GOOD + "  cpu_offload: true\n  sharding: none\n",
        11,
        "training.cpu_offload has no effect: sharding: none divides no model",
    ),
    "eval data never used": (GOOD.replace("  eval_steps: 10\n", ""), 6, "needs training.eval_steps"),
    "held-out share never used": (
        NO_EVAL.replace("  train", "  eval_size: 0.1\n  train"),
        5,
        "data.eval_size needs training.eval_steps",
    ),
    "cadence without eval data": (NO_EVAL + "  eval_steps: 10\n", 9, "there is no eval data"),
    "first evaluation without eval data": (NO_EVAL + "  eval_on_start: true\n", 9, "there is no eval data"),
    "best of no evaluation": (
        NO_EVAL + "  keep_best: {metric: eval_loss, mode: min}\n",
        9,
        "training.keep_best has no effect: there is no eval data",
    ),
    "stopping by no metric": (
        GOOD + "  early_stopping: {patience: 3}\n",
        11,
        "early_stopping needs keep_best, whose metric it watches",
    ),
    "best by a metric that no evaluation reports": (
        GOOD + "  keep_best: {metric: eval_held_loss, mode: min}\n",
        11,
        "training.keep_best.metric: no evaluation reports 'eval_held_loss', did you mean 'eval_loss'?",
    ),
    "a benchmark twice": (
        GOOD + "eval: {benchmarks: [arc_easy, {task: arc_easy, limit: 5}]}\n",
        11,
        "eval.benchmarks[1]: 'arc_easy' is in the list already",
    ),
    "a gate without a bound": (
        GOOD + "eval: {gates: [{metric: kl, max: 8}, {metric: loss}]}\n",
        11,
        "eval.gates[1]: the gate has no bound",
    ),
    "a gate that nothing passes": (
        GOOD + "eval: {gates: [{metric: kl, max: 8, min: 9}]}\n",
        11,
        "min (9) is above max (8), so no value passes",
    ),
    "two eval sets of one name": (
        GOOD.replace("  train", "  eval_size: 9\n  train"),
        5,
        "data.eval has one of that name; rename it",
    ),
    "two warm-ups": (GOOD + "  warmup_ratio: 0.1\n  warmup_steps: 5\n", 12, "not both"),
    "two lengths of the run": (
        GOOD + "  max_steps: 5\n  num_train_epochs: 1\n",
        12,
        "max_steps sets the length of the run",
    ),
    "rank of a continued adapter": (GOOD.replace("{}", "{start: continue, r: 8}"), 3, "lora.r has no effect"),
    "targets of a continued adapter": (
        GOOD.replace("{}", "{start: continue, target_modules: all-linear}"),
        3,
        "lora.target_modules has no effect",
    ),
    "divided matrices of DoRA": (
        GOOD.replace("{}", "{use_dora: true}") + "  sharding: full\n",
        3,
        "use_dora needs whole weight matrices",
    ),
    "quantised weights that an adapter changes": (
        GOOD.replace("{}", "{init_lora_weights: olora}") + "quantization: {load_in_4bit: true}\n",
        3,
        "init_lora_weights: olora changes the weights, so these cannot be quantised",
    ),
    "weights by columns and norms": (
        GOOD.replace("{}", "{init_lora_weights: pissa, use_dora: true}"),
        3,
        "cannot be exported with use_dora",
    ),
    "layers beside an expression": (
        GOOD.replace("{}", "{target_modules: '.*q_proj', layers_to_transform: [1]}"),
        3,
        "target_modules is a regular expression, which names the layers",
    ),
    "one name as an expression": (GOOD.replace("{}", "{target_modules: q_proj}"), 3, "a list of module names"),
    "no reference where one is needed": (
        GOOD + DPO.format("{type: ipo}", "{mode: none}"),
        11,
        "the loss 'ipo' needs a reference",
    ),
    "reference where none is used": (
        GOOD + DPO.format("{reference_free: true}", "{mode: cached}"),
        11,
        "dpo.reference.mode has no effect",
    ),
    "another reference where none is used": (
        GOOD + DPO.format("{reference_free: true}", "{path: other}"),
        11,
        "dpo.reference.path has no effect",
    ),
    "moving reference where none is used": (
        GOOD + DPO.format("{reference_free: true}", "{sync_steps: 8}"),
        11,
        "dpo.reference.sync_steps has no effect",
    ),
    "moving reference that is kept": (
        GOOD + DPO.format("{}", "{mode: cached, sync_steps: 8}"),
        11,
        "mode: cached computes the reference once",
    ),
    "moving reference that is left out": (GOOD + DPO.format("{}", "{mode: none, sync_steps: 8}"), 11, "needs a ref"),
    "moving reference that is another model": (
        GOOD + DPO.format("{}", "{path: other, sync_steps: 8}"),
        11,
        "path names another model",
    ),
    "share of a reference that does not move": (
        GOOD + DPO.format("{}", "{sync_alpha: 0.5}"),
        11,
        "sync_steps is not set",
    ),
    "section of the other method": (GOOD + "sft: {loss_on: last}\n", 11, "the method is dpo"),
    "run directory over the model": (
        GOOD.replace("some/model", "./runs/x"),
        8,
        "output_dir is the folder of the model",
    ),
    "no model": (GOOD.replace("{model_name_or_path: some/model}", "{}"), 2, "or from_scratch"),
    "two models": (
        GOOD.replace("some/model", "m, from_scratch: {config: {model_type: llama}, tokenizer: {vocab_size: 300}}"),
        2,
        "not both",
    ),
    "revision of a new model": (
        GOOD.replace(
            "model_name_or_path: some/model",
            "revision: main, from_scratch: {config: {model_type: llama}, tokenizer: {vocab_size: 300}}",
        ),
        2,
        "loads nothing from the hub",
    ),
    "betas of rmsprop": (GOOD + "  optim: rmsprop\n  adam_beta1: 0.9\n", 12, "no such parameter"),
    "bfloat16 weights of an adapter": (
        GOOD + "  param_dtype: bfloat16\nlora: {r: 4}\n",
        11,
        "adapters are always trained in float32",
    ),
    "bfloat16 weights computed in float16": (
        GOOD.replace("{model_name_or_path", "{dtype: float16, model_name_or_path") + "  param_dtype: bfloat16\n",
        11,
        "needs model.dtype: auto or bfloat16, not float16",
    ),
    "bfloat16 weights with rmsprop": (
        GOOD + "  optim: rmsprop\n  param_dtype: bfloat16\n",
        12,
        "rmsprop does not round stochastically",
    ),
    "config without a type": (
        GOOD.replace("model_name_or_path: some/model", "from_scratch: {config: {}, tokenizer: {vocab_size: 300}}"),
        2,
        "expected a transformers config that has a model_type, got an empty mapping",
    ),
}


def test_without_contradictions_there_is_nothing_to_say() -> None:
    for text in (GOOD, NO_EVAL):
        assert parse_recipe(text, "r", command="dpo").method == "dpo"


@pytest.mark.parametrize(
    "source",
    [
        "{path: p, overlong: truncate, prompt_truncation: keep_start}",
        "{path: p, max_length: 2048, max_prompt_length: 1024}",
        "{path: p, pairs: all, min_margin: 1, max_pairs_per_prompt: 4, ties: keep, metrics: mine}",
    ],
)
def test_what_a_source_says_of_itself_is_taken(source: str) -> None:
    text = GOOD.replace("[pairs.jsonl]", f"[{source}]").replace("  train", "  prompt_truncation: keep_end\n  train")
    text = text if "truncate" in source else text.replace("  prompt_truncation: keep_end\n", "")
    assert parse_recipe(text, "r", command="dpo").data.train[0].path == "p"


@pytest.mark.parametrize("key", ["pairs: all", "min_margin: 1", "max_pairs_per_prompt: 1", "ties: drop"])
@pytest.mark.parametrize("where", ["pairs", "heldout"])
def test_demonstrations_have_no_use_for_pairs(key: str, where: str) -> None:
    text = GOOD.replace("dpo", "sft").replace(f"[{where}.jsonl]", f"[x, {{path: p, {key}}}]")
    with pytest.raises(RecipeError) as refused:
        parse_recipe(text, "r", command="sft")
    (problem,) = refused.value.problems
    assert problem.place.line == (5 if where == "pairs" else 6)
    assert f"[1].{key.split(':')[0]} has no effect" in problem.message


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_refused_at_its_key(name: str) -> None:
    text, line, said = CONTRADICTIONS[name]
    with pytest.raises(RecipeError) as refused:
        parse_recipe(text, "r", command="dpo")
    assert any(problem.place.line == line and said in problem.message for problem in refused.value.problems), str(
        refused.value
    )


@pytest.mark.parametrize(("method", "command"), [("sft", "dpo"), ("dpo", "sft")])
def test_a_recipe_is_refused_by_the_other_command(method: str, command: str) -> None:
    with pytest.raises(RecipeError, match=f"run `dpoctl {method}`"):
        parse_recipe(GOOD.replace("dpo", method), "r", command=command)


def test_a_reference_free_loss_goes_without_saying_more() -> None:
    for mode in ("auto", "none"):
        text = GOOD + DPO.format("{reference_free: true}", f"{{mode: {mode}}}")
        assert parse_recipe(text, "r", command="dpo").dpo.reference.mode == mode
