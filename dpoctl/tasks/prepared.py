"""A recipe's tokenizer and token stores: what training, evaluation and a dry run start from."""

from contextlib import nullcontext

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from dpoctl.data.prepare import PreparedData, cache_dir, iter_texts, prepare
from dpoctl.model.tokenizer import load_tokenizer
from dpoctl.recipe.schema import Recipe


def read_data(
    recipe: Recipe, accelerator: Accelerator | None = None, *, only_eval: bool = False
) -> tuple[PreTrainedTokenizerBase, PreparedData]:
    """Load the tokenizer and the token stores.

    Args:
        recipe: checked and complete.
        accelerator: of the ranks: the first one builds the stores, the others find them.
        only_eval: leave the training set out.
    """
    with nullcontext() if accelerator is None else accelerator.main_process_first():
        tokenizer = load_tokenizer(recipe, lambda: iter_texts(recipe))
        return tokenizer, prepare(recipe, tokenizer, cache_dir=cache_dir(), only_eval=only_eval)
