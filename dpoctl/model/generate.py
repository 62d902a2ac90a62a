"""Text generation in batches with a KV cache; a sample depends on its prompt and the seed only.

transformers' own `generate` decodes. Only the sampling step is replaced: each prompt has its own sequence of random
numbers, so its text does not depend on other prompts of the batch or on the global random generator.
"""

import hashlib
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
from dpoctl.model.attention import SHARED_PREFIX, use_attention
from dpoctl.model.compile import uncompiled


@dataclass(frozen=True)
class SamplingParams:
    """Settings of sampling. Of the model's own generation settings only the end-of-turn tokens are used."""

    max_new_tokens: int = 128
    temperature: float = 0.7
    """0 is greedy decoding."""
    top_p: float = 0.9
    """Sample from the smallest set of most likely tokens whose probabilities sum to this."""
    seed: int = 0
    batch_size: int = 16
    """Prompts per batch; it changes no text, apart from rounding."""


@dataclass(frozen=True)
class Generation:
    """One generated text, without special tokens."""

    text: str
    finished: bool | None
    """True if the model ended its turn, false if `max_new_tokens` cut it off; None if a server does not say."""
    ids: tuple[int, ...] = field(default=(), compare=False)
    """Its tokens with the one that ends the turn; empty if they are not known."""


def generate(
    causal: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    on_batch: Callable[[int], None] = lambda count: None,
    rounds: int = 0,
) -> list[Generation]:
    """Continue each prompt until the model ends its turn.

    The same prompt and seed give the same text, whatever the other prompts are; each repetition of a prompt gets a
    different text. Weights of mixed precision compute under autocast to the lower one; float32 weights compute under
    the caller's autocast, if any.

    Args:
        causal: the causal model, adapters injected; its state is restored afterwards.
        tokenizer: its tokenizer.
        prompts: token ids.
        sampling: settings of sampling.
        on_batch: called after each batch with the number of its prompts.
        rounds: of a sharded model, the number of batches that every rank runs, in step; a rank with fewer batches
            repeats its first prompt.

    Returns:
        One generation for each prompt, in their order.

    Raises:
        RunError: a prompt is empty, or fills the model's context.
    """
    seeds = _seeds(prompts, sampling.seed)
    # Prompts of similar length in one batch need less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    generations: dict[int, Generation] = {}
    with generation_mode(causal):
        for start in range(0, len(order), sampling.batch_size):
            chunk = order[start : start + sampling.batch_size]
            batch = _Batch(causal, tokenizer, [prompts[i] for i in chunk], [seeds[i] for i in chunk], sampling)
            generations.update(zip(chunk, batch.run(synced_gpus=rounds > 0), strict=True))
            on_batch(len(chunk))
        for _ in range(rounds - -(-len(order) // sampling.batch_size)):
            _Batch(causal, tokenizer, prompts[:1], seeds[:1], sampling).run(synced_gpus=True)
    return [generations[index] for index in range(len(prompts))]


def stops_of(causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end a turn: the tokenizer's, then those of the model's generation settings."""
    own = getattr(causal.generation_config, "eos_token_id", None)
    tokens = own if isinstance(own, list) else [own]
    return tuple(dict.fromkeys(token for token in [tokenizer.eos_token_id, *tokens] if isinstance(token, int)))


def stream(
    causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], sampling: SamplingParams
) -> Iterator[str]:
    """Continue one prompt, and yield its text in pieces as it is generated; the text is that of `generate`.

    Raises:
        RunError: the prompt is empty, or fills the model's context.
    """
    batch = _Batch(causal, tokenizer, [prompt], _seeds([prompt], sampling.seed), sampling)
    pieces = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    stop = _Stop()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with generation_mode(causal):
                batch.run(streamer=pieces, stopping_criteria=StoppingCriteriaList([stop]))
        except BaseException as error:  # raised again in the caller's thread
            failures.append(error)
            # Not `end`, which decodes once more: that may be what failed.
            pieces.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from filter(None, pieces)
    finally:
        stop.requested = True
        thread.join()
    if failures:
        raise failures[0]


class _Batch:
    """Prompts that are continued together, padded on the left."""

    def __init__(
        self,
        causal: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
    ) -> None:
        self._causal, self._tokenizer = causal, tokenizer
        self._stop_tokens = stops_of(causal, tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._stop_tokens, default=0)
        if not all(prompts):
            raise RunError("a prompt is empty")
        width = max(len(prompt) for prompt in prompts)
        context = int(getattr(causal.config, "max_position_embeddings", None) or 1 << 30)
        if width >= context:
            raise RunError(
                f"a prompt of {width} tokens leaves no room for a response: the model's context is {context} tokens"
            )
        device = cast(Tensor, causal.get_input_embeddings().weight).device
        padding = [width - len(prompt) for prompt in prompts]
        rows = [[pad] * count + list(prompt) for count, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * count + [1] * (width - count) for count in padding]
        self._input_ids, self._mask = torch.tensor(rows, device=device), torch.tensor(mask, device=device)
        self._processors = _processors(sampling, seeds, device)
        self._settings = GenerationConfig(
            max_new_tokens=min(sampling.max_new_tokens, context - width),
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted(self._stop_tokens) or None,
        )

    def run(self, **kwargs: Any) -> list[Generation]:
        """Generate; `kwargs` are further arguments of transformers' `generate`."""
        untyped: Any = self._causal
        ids: Tensor = untyped.generate(
            self._input_ids,
            attention_mask=self._mask,
            generation_config=self._settings,
            logits_processor=self._processors,
            **kwargs,
        )
        return [self._decode(row) for row in ids[:, self._input_ids.shape[1] :].tolist()]

    def _decode(self, ids: list[int]) -> Generation:
        end = next((index for index, token in enumerate(ids) if token in self._stop_tokens), None)
        text = self._tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(str(text), end is not None, tuple(ids if end is None else ids[: end + 1]))


class _SampleToken(LogitsProcessor):
    """Samples a token for each row with the row's own random numbers, and sets all other scores to -inf."""

    def __init__(self, uniforms: Tensor) -> None:
        self._columns = iter(uniforms.unbind(dim=1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.float().softmax(-1).cumsum(-1)
        # The random numbers are in (0, 1], so the first sum that reaches one is at a token of nonzero probability.
        sampled = torch.searchsorted(cumulative, next(self._columns)[:, None] * cumulative[:, -1:])
        return torch.full_like(scores, float("-inf")).scatter(1, sampled, 0.0)


class _Stop(StoppingCriteria):
    """Ends the generation of a batch on request from another thread."""

    requested = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.requested, dtype=torch.bool, device=input_ids.device)


def _processors(sampling: SamplingParams, seeds: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """Return the logits processors that sample a token; none for greedy decoding."""
    if sampling.temperature == 0:
        return LogitsProcessorList()
    # Generated on the CPU, so that they are the same on every device.
    uniforms = [1 - torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
    steps: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*steps, _SampleToken(torch.stack(uniforms).to(device))])


def _seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """Return a seed for each prompt: a hash of its tokens and of the number of equal prompts before it."""
    repetitions: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in prompts:
        ids = tuple(prompt)
        digest = hashlib.sha256(array("q", [seed, repetitions[ids], *ids]).tobytes()).digest()
        seeds.append(int.from_bytes(digest[:8], "little") >> 1)
        repetitions[ids] += 1
    return seeds


@contextmanager
def library_forward(causal: PreTrainedModel) -> Iterator[None]:
    """Let a model take the inputs that other libraries give it: its own attention, uncompiled, in one precision."""
    with ExitStack() as stack:
        stack.enter_context(uncompiled(causal))
        if causal.config._attn_implementation == SHARED_PREFIX:
            stack.enter_context(use_attention(causal, "sdpa" if causal._supports_sdpa else "eager"))
        if (dtype := _autocast_dtype(causal)) is not None:
            stack.enter_context(torch.autocast(causal.device.type, dtype))
        yield


@contextmanager
def generation_mode(causal: PreTrainedModel) -> Iterator[None]:
    """Prepare a model, which may be in training, to generate, and restore its state afterwards.

    Eval mode also turns gradient checkpointing off, which does not allow a KV cache.
    """
    modes = [(module, module.training) for module in causal.modules()]
    settings = causal.generation_config
    with library_forward(causal):
        try:
            causal.eval()
            # A repetition penalty or top-k of the model's own settings would change the distribution.
            causal.generation_config = GenerationConfig(eos_token_id=getattr(settings, "eos_token_id", None))
            yield
        finally:
            causal.generation_config = settings
            for module, training in modes:
                module.training = training


def _autocast_dtype(causal: PreTrainedModel) -> torch.dtype | None:
    """Return the lower precision of a model that also has float32 weights, such as adapters, else `None`."""
    dtypes = {parameter.dtype for parameter in causal.parameters() if parameter.is_floating_point()}
    low = dtypes - {torch.float32, torch.float64}
    return low.pop() if len(low) == 1 and len(dtypes) > 1 else None
