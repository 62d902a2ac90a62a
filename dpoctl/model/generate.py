"""Text from a causal model: batches with a KV cache, samples that depend on nothing but the prompt and the seed.

The decoding is transformers' own `generate`. Only the draw is ours: each prompt brings its own sequence of random
numbers, so that its text does not depend on the batch it stands in, on other prompts, or on the global generator.
"""

import hashlib
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopPLogitsWarper,
)

from dpoctl.errors import RunError
from dpoctl.model.attention import SHARED_PREFIX, attention
from dpoctl.model.compiled import as_written


@dataclass(frozen=True)
class Sampling:
    """How text is drawn. The model's own generation settings play no part, besides the tokens that end a turn."""

    max_new_tokens: int = 128
    temperature: float = 0.7
    """0 takes the most likely token."""
    top_p: float = 0.9
    """Draw from the most likely tokens that hold this much probability together."""
    seed: int = 0
    batch_size: int = 16
    """Prompts at a time; the texts do not depend on it, apart from rounding."""


@dataclass(frozen=True)
class Generation:
    """One text, without special tokens."""

    text: str
    finished: bool
    """The model ended its turn; false where it was cut off."""


def generate(
    causal: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Generation]:
    """Continue each prompt until the model ends its turn.

    The same prompt and seed give the same text, whatever other prompts there are; a prompt that comes several times
    gets another text each time. Mixed weights compute under autocast of the narrower precision; around weights that
    are all float32 the caller's own autocast region decides.

    Args:
        causal: the causal model, adapters injected; left as it was found.
        tokenizer: its tokenizer.
        prompts: token ids.
        sampling: how to draw.
        on_batch: called after each batch with the number of its prompts.

    Returns:
        One generation for each prompt, in their order.

    Raises:
        RunError: a prompt is empty, or leaves no room in the model's context.
    """
    seeds = _seeds(prompts, sampling.seed)
    # Like lengths together: less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    found: dict[int, Generation] = {}
    with _generating(causal):
        for start in range(0, len(order), sampling.batch_size):
            batch = order[start : start + sampling.batch_size]
            job = _Job.of(causal, tokenizer, [prompts[i] for i in batch], [seeds[i] for i in batch], sampling)
            found.update(zip(batch, job.run(), strict=True))
            on_batch(len(batch))
    return [found[index] for index in range(len(prompts))]


def stream(
    causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], sampling: Sampling
) -> Iterator[str]:
    """Continue one prompt, and yield its text in pieces as it comes; the same text as `generate` gives.

    Raises:
        RunError: the prompt is empty, or leaves no room in the model's context.
    """
    job = _Job.of(causal, tokenizer, [prompt], _seeds([prompt], sampling.seed), sampling)
    pieces = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    nobody_listens = _Stop()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with _generating(causal):
                job.run(streamer=pieces, stopping_criteria=StoppingCriteriaList([nobody_listens]))
        except BaseException as error:  # carried over to the thread that asked
            failures.append(error)
            pieces.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from filter(None, pieces)
    finally:
        nobody_listens.wanted = True
        thread.join()
    if failures:
        raise failures[0]


@dataclass(frozen=True)
class _Job:
    """One batch, ready to run."""

    causal: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    input_ids: Tensor
    attention_mask: Tensor
    settings: GenerationConfig
    draw: LogitsProcessorList
    stops: frozenset[int]

    @classmethod
    def of(
        cls,
        causal: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> "_Job":
        stops = _stop_tokens(causal, tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
        width = max(len(prompt) for prompt in prompts)
        new_tokens = min(sampling.max_new_tokens, _room(causal, width))
        if new_tokens < 1 or not all(prompts):
            raise RunError(f"a prompt of {width} tokens leaves no room for an answer" if width else "a prompt is empty")
        rows = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = cast(Tensor, causal.get_input_embeddings().weight).device
        settings = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted(stops) or None,
        )
        draw = _draw(sampling, seeds, device)
        ids, seen = torch.tensor(rows, device=device), torch.tensor(mask, device=device)
        return cls(causal, tokenizer, ids, seen, settings, draw, stops)

    def run(self, **kwargs: Any) -> list[Generation]:
        run: Any = self.causal.generate
        ids: Tensor = run(
            self.input_ids,
            attention_mask=self.attention_mask,
            generation_config=self.settings,
            logits_processor=self.draw,
            **kwargs,
        )
        return [self._read(row) for row in ids[:, self.input_ids.shape[1] :].tolist()]

    def _read(self, ids: list[int]) -> Generation:
        end = next((at for at, token in enumerate(ids) if token in self.stops), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(str(text), end is not None)


class _Draw(LogitsProcessor):
    """Draw a token for each row by that row's own random numbers, and leave no other to choose."""

    def __init__(self, uniforms: Tensor) -> None:
        self._columns = iter(uniforms.unbind(dim=1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.float().softmax(-1).cumsum(-1)
        # The numbers are above 0 and at most 1, so the first sum that reaches one belongs to a token with a chance.
        drawn = torch.searchsorted(cumulative, next(self._columns)[:, None] * cumulative[:, -1:])
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)


class _Stop(StoppingCriteria):
    """Ends the generation of a batch from outside."""

    wanted = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.wanted, dtype=torch.bool, device=input_ids.device)


def _draw(sampling: Sampling, seeds: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """Build what turns scores into a choice. None for greedy decoding."""
    if sampling.temperature == 0:
        return LogitsProcessorList()
    # Drawn on the CPU: the same numbers on every device.
    uniforms = [1 - torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
    steps: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*steps, _Draw(torch.stack(uniforms).to(device))])


def _seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """A seed for each prompt, made of its tokens and of how many like it came before."""
    times: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in prompts:
        ids = tuple(prompt)
        digest = hashlib.sha256(array("q", [seed, times[ids], *ids]).tobytes()).digest()
        seeds.append(int.from_bytes(digest[:8], "little") >> 1)
        times[ids] += 1
    return seeds


def _stop_tokens(causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a turn: the tokenizer's, and those that the model's own settings name besides."""
    own = getattr(causal.generation_config, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    return frozenset(token for token in [tokenizer.eos_token_id, *named] if isinstance(token, int))


def _room(causal: PreTrainedModel, width: int) -> int:
    """How many tokens a context still holds."""
    context = getattr(causal.config, "max_position_embeddings", None)
    return int(context) - width if context else 1 << 30


@contextmanager
def _generating(causal: PreTrainedModel) -> Iterator[None]:
    """Prepare a model, which may be in training, to generate; set everything back afterwards.

    Eval mode also turns recomputation off, which would forbid the cache.
    """
    modes = [(module, module.training) for module in causal.modules()]
    settings = causal.generation_config
    with ExitStack() as stack:
        stack.enter_context(as_written(causal))
        if causal.config._attn_implementation == SHARED_PREFIX:
            stack.enter_context(attention(causal, "sdpa" if causal._supports_sdpa else "eager"))
        if (narrow := _autocast_dtype(causal)) is not None:
            stack.enter_context(torch.autocast(causal.device.type, narrow))
        try:
            causal.eval()
            # A repetition penalty or a top-k that comes with a model would sample from another distribution.
            causal.generation_config = GenerationConfig(eos_token_id=getattr(settings, "eos_token_id", None))
            yield
        finally:
            causal.generation_config = settings
            for module, training in modes:
                module.training = training


def _autocast_dtype(causal: PreTrainedModel) -> torch.dtype | None:
    """The narrow precision where float32 weights, such as adapters, stand among weights of it."""
    kinds = {parameter.dtype for parameter in causal.parameters() if parameter.is_floating_point()}
    narrow = kinds - {torch.float32, torch.float64}
    return narrow.pop() if len(narrow) == 1 and len(kinds) > 1 else None
