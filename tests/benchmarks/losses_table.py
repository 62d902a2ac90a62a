"""Train every loss on the demo's pairs with the same budget, and print what came out as a table.

    make losses
    python tests/benchmarks/losses_table.py runs --losses sigmoid ipo

The folder holds reviewer2-sft and reviewer2-pairs of `make demo`. Each loss starts from the same model, sees the same
pairs (labels and rankings are made of them) in as many steps at the same learning rate, with its default settings.

accuracy  share of held-out pairs whose harsh review gained more log-probability over the reference than the kind one
harsh     share of texts drawn at temperature 1 that are harsh reviews throughout
tokens    median length of these texts
KL        mean over these texts of log pi(y|x) - log ref(y|x), in nats a text
seconds   of processor time, start-up and reference pass included
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from demo_sides import side_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import dpoctl
from dpoctl import console
from dpoctl.data.tokenize import render_prompts
from dpoctl.losses import LOSSES
from dpoctl.model.generate import SamplingParams, generate
from dpoctl.model.load import load_run
from dpoctl.model.source import find_source
from dpoctl.model.tokenizer import read_tokenizer
from dpoctl.tasks.setup import quiet_libraries

RECIPE = Path(__file__).parents[2] / "recipes" / "reviewer2-dpo.yaml"
SAMPLING = SamplingParams(max_new_tokens=96, temperature=1.0, top_p=1.0, seed=0, batch_size=100)
SAMPLES_PER_PROMPT = 2
# No evaluation on the way: the figures of the table are taken at the end, alike for all losses.
ALIKE = ("data.eval={}", "eval={}", "training.eval_steps=null")
COLUMNS = ("loss", "accuracy", "harsh", "tokens", "KL", "seconds")

Row = dict[str, Any]
Model = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--losses", nargs="*", default=list(LOSSES), choices=list(LOSSES), metavar="LOSS")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = arguments.runs / "losses"
    data = write_data(arguments.runs / "reviewer2-pairs", folder)
    held_out = read(arguments.runs / "reviewer2-pairs" / "pairs-test.jsonl")
    reference = load(arguments.runs / "reviewer2-sft")
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---|{'--:|' * (len(COLUMNS) - 1)}"]
    lines.append(line("(the model before)", measure(reference, reference, held_out), None))
    for name in arguments.losses:
        run = folder / name
        began = time.process_time()
        overrides = [f"data.train=[{data[LOSSES[name].rows]}]", f"dpo.loss={{type: {name}}}", *ALIKE]
        overrides += [f"model.model_name_or_path={arguments.runs / 'reviewer2-sft'}", f"training.output_dir={run}"]
        dpoctl.dpo(RECIPE, overrides=overrides, overwrite=True)
        seconds = time.process_time() - began
        lines.append(line(f"`{name}`", measure(load(run), reference, held_out), seconds))
        console.say(lines[-1])
    for text in lines:
        console.emit(text)


def line(name: str, numbers: dict[str, float], seconds: float | None) -> str:
    took = "" if seconds is None else f"{seconds:.0f}"
    figures = f"{numbers['accuracy']:.2f} | {numbers['harsh']:.2f} | {numbers['tokens']:.0f} | {numbers['kl']:.1f}"
    return f"| {name} | {figures} | {took} |"


def write_data(pairs: Path, folder: Path) -> dict[str, Path]:
    """Write the pairs as labelled rows, and as rankings whose last answer is a kind review of another paper."""
    rows = read(pairs / "pairs-train.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    files = {"pairs": pairs / "pairs-train.jsonl"}
    for kind, made in (("labels", labelled(rows)), ("rankings", ranked(rows))):
        files[kind] = folder / f"{kind}.jsonl"
        files[kind].write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return files


def labelled(rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        yield {"prompt": row["prompt"], "completion": row["chosen"], "label": True}
        yield {"prompt": row["prompt"], "completion": row["rejected"], "label": False}


def ranked(rows: Sequence[Row]) -> Iterator[Row]:
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        answers = [row["chosen"], row["rejected"], other["rejected"]]
        if answers[1] != answers[2]:
            yield {"prompt": row["prompt"], "responses": answers, "scores": [2.0, 1.0, 0.0]}


def load(folder: Path) -> Model:
    policy = load_run(folder, torch.device("cpu"), torch.float32)
    return policy.causal, read_tokenizer(find_source(str(folder)))


def measure(policy: Model, reference: Model, held_out: Sequence[Row]) -> dict[str, float]:
    """Return the figures of one row of the table."""
    causal, tokenizer = policy
    margins = [
        ratio(policy, reference, row["prompt"], row["chosen"][0]["content"])
        - ratio(policy, reference, row["prompt"], row["rejected"][0]["content"])
        for row in held_out
    ]
    prompts = [row["prompt"] for row in held_out] * SAMPLES_PER_PROMPT
    texts = [one.text for one in generate(causal, tokenizer, render_prompts(tokenizer, prompts, {}), SAMPLING)]
    return {
        "accuracy": statistics.fmean(margin > 0 for margin in margins),
        "harsh": statistics.fmean(side_of(text) == "harsh" for text in texts),
        "tokens": statistics.median(len(answer_ids(tokenizer, text)) for text in texts),
        "kl": statistics.fmean(
            ratio(policy, reference, prompt, text) for prompt, text in zip(prompts, texts, strict=True)
        ),
    }


def ratio(policy: Model, reference: Model, prompt: list[Row], answer: str) -> float:
    """Log pi(y|x) - log ref(y|x)."""
    return logp(policy, prompt, answer) - logp(reference, prompt, answer)


@torch.no_grad()
def logp(model: Model, prompt: list[Row], answer: str) -> float:
    """Log-probability of an answer, its end included, by the model's plain forward."""
    causal, tokenizer = model
    context, ids = render_prompts(tokenizer, [prompt], {})[0], answer_ids(tokenizer, answer)
    logits = causal(input_ids=torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], int(tokenizer.eos_token_id)]


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
