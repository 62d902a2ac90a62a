"""A recipe's tokenizer and token stores: what training, evaluation and a dry run start from."""

from contextlib import nullcontext
from dataclasses import replace

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from dpoctl.core.mismatched import Mismatched
from dpoctl.data.prepare import PreparedData, cache_dir, iter_texts, prepare
from dpoctl.data.store import TokenStore
from dpoctl.model.tokenizer import load_tokenizer
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks.task import build_task


def read_data(
    recipe: Recipe, accelerator: Accelerator | None = None, *, only_eval: bool = False
) -> tuple[PreTrainedTokenizerBase, PreparedData]:
    """Load the tokenizer and the token stores, as the loss needs to see them.

    Args:
        recipe: checked and complete.
        accelerator: of the ranks: the first one builds the stores, the others find them.
        only_eval: leave the training set out.
    """
    task = build_task(recipe)
    with nullcontext() if accelerator is None else accelerator.main_process_first():
        tokenizer = load_tokenizer(recipe, lambda: iter_texts(recipe, task.rows))
        data = prepare(recipe, tokenizer, cache_dir=cache_dir(), wants=task.rows, only_eval=only_eval)
    return tokenizer, _mismatched(data, recipe) if "mismatched" in task.needs else data


def metric_names(recipe: Recipe, name: str) -> dict[int, str]:
    """Return the numbers of the sources of a set that have metrics of their own, and the names of these.

    Args:
        recipe: checked and complete.
        name: of an eval set; any other is the training set, which is also what `eval_size` holds out of.
    """
    sources = recipe.data.eval.get(name, recipe.data.train)
    return {number: source.metrics for number, source in enumerate(sources) if source.metrics is not None}


def _mismatched(data: PreparedData, recipe: Recipe) -> PreparedData:
    """Give each record a second response, which belongs to another prompt."""
    longest = recipe.data.max_length
    evals: dict[str, TokenStore] = {name: Mismatched(store, longest) for name, store in data.evals.items()}
    return replace(data, evals=evals, train_store=data.train_store and Mismatched(data.train_store, longest))
