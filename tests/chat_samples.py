"""Chat templates as models ship them, tokenizers that know their control tokens, and conversations for them."""

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

OWN = Path(__file__).parent / "data" / "templates"
CORPUS = ["Human: what is the capital of France? Assistant: Paris, of course. yes one, no two, because.\n\n"]
BAR = "\N{FULLWIDTH VERTICAL LINE}"
CONTROL = re.compile(
    rf"<\|[^|>\s\"]+\|>|<{BAR}[^{BAR}]+{BAR}>|<(?:start|end)_of_turn>|<end_of_utterance>"
    r"|<turn\|>|<\|(?:turn|channel)>|<channel\|>|</?think>"
)
BOS = "<bos>"
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": f"<{BAR}end▁of▁sentence{BAR}>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "llava": "</s>",
    "mistral": "</s>",
    "muse": "<|eot|>",
    "phi3": "<|endoftext|>",
    "zephyr": "</s>",
    **dict.fromkeys(["chatml", "hermes", "lfm2", "nemotron", "qwen", "smollm3"], "<|im_end|>"),
    "glm": "<|endoftext|>",
}
"""The end-of-sequence token of the tokenizers that come with a family's templates, by how their names begin."""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


THOUGHT = "<think>\nhm\n</think>\n\nyes one"
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], ...]] = {
    "plain": ([user("What?")], [assistant("yes one")], [assistant("no two")]),
    "system": ([system("Be kind."), user("What?")], [assistant("yes one")], [assistant("no two")]),
    "history": ([user("What?"), assistant("this"), user("And?")], [assistant("yes one")], [assistant("no two")]),
    "turns": ([user("What?")], [assistant("yes one"), user("Why?"), assistant("because")], [assistant("no two")]),
    "blanks": ([user(" What? \n")], [assistant("  yes one \n")], [assistant(" no two")]),
    "think": ([user("What?")], [assistant(THOUGHT)], [assistant("no two")]),
}
"""A prompt and two answers each."""


def build_tokenizer(name: str, template: str, *, special: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has the control tokens of a template, flagged as special ones or not."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    eos = next(end for family, end in ENDS.items() if name.startswith(family))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=eos)
    written = sorted(set(CONTROL.findall(template)))
    for is_special in (True, False):
        # Thinking is marked by added tokens that are no special ones: they are part of the answer.
        found = [token for token in written if ("think>" not in token) == is_special]
        tokenizer.add_tokens(found, special_tokens=is_special and special)
    tokenizer.chat_template = template
    return tokenizer
