"""Generation restores the state of a model, and its text depends on the prompt and the seed only."""

import random
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpoctl.core.logps import Scorer
from dpoctl.errors import RunError
from dpoctl.model.attention import SHARED_PREFIX
from dpoctl.model.generate import Generation, SamplingParams, generate, stream
from dpoctl.model.memory import set_gradient_checkpointing
from dpoctl.model.policy import Policy
from dpoctl.model.probe import ProbeResult

WARM = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.95, seed=3)
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)


@pytest.fixture
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(4, 300) for _ in range(length)] for length in (5, 17, 3, 9, 9, 30, 1)]


def test_order_and_batching_do_not_change_any_text(tiny_llama, tokenizer, prompts):
    separate = [generate(tiny_llama, tokenizer, [prompt], WARM)[0] for prompt in prompts]
    for batch_size in (2, 16):
        sampling = SamplingParams(12, 1.0, 0.95, seed=3, batch_size=batch_size)
        assert generate(tiny_llama, tokenizer, prompts, sampling) == separate
        assert generate(tiny_llama, tokenizer, prompts[::-1], sampling) == separate[::-1]


def test_only_the_seed_matters_and_the_global_generator_is_not_used(tiny_llama, tokenizer, prompts):
    first = generate(tiny_llama, tokenizer, prompts, WARM)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert generate(tiny_llama, tokenizer, prompts, WARM) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(tiny_llama, tokenizer, prompts, SamplingParams(12, 1.0, 0.95, seed=4)) != first


def test_a_repeated_prompt_gets_another_text(tiny_llama, tokenizer, prompts):
    twice = generate(tiny_llama, tokenizer, [prompts[0]] * 2, WARM)
    assert twice[0] == generate(tiny_llama, tokenizer, [prompts[0]], WARM)[0] != twice[1]


def test_greedy_text_is_that_of_transformers_alone(tiny_llama, tokenizer, prompts):
    for prompt, found in zip(prompts, generate(tiny_llama, tokenizer, prompts, GREEDY), strict=True):
        ids = tiny_llama.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2)
        assert found.text == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def test_samples_follow_the_distribution_of_the_model(tiny_llama, tokenizer):
    tiny_llama.lm_head.weight.data.mul_(4)
    prompt = [7, 31, 150]
    with torch.no_grad():
        expected = tiny_llama(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    sampling = SamplingParams(max_new_tokens=1, temperature=1.0, top_p=1.0, batch_size=500)
    # One token each, read back by its text where that is unambiguous.
    likely = int(expected.argmax())
    texts = [found.text for found in generate(tiny_llama, tokenizer, [prompt] * 2000, sampling)]
    share = texts.count(tokenizer.decode([likely], skip_special_tokens=True)) / len(texts)
    assert share == pytest.approx(float(expected[likely]), abs=0.04)


def test_the_end_of_turn_finishes_a_text_and_is_not_part_of_it(tiny_llama, tokenizer, monkeypatch):
    # The bias makes <|im_end|> certain, or impossible.
    end = tokenizer.eos_token_id
    for finished, bias in ((True, 1e4), (False, -1e4)):

        def add_bias(module, inputs, output, bias=bias):
            output[..., end] = bias

        hook = tiny_llama.lm_head.register_forward_hook(add_bias)
        found = generate(tiny_llama, tokenizer, [[5, 6]], WARM)[0]
        hook.remove()
        assert found.finished is finished
        assert (found == Generation("", True)) is finished
        assert "<|im_end|>" not in found.text


def test_generation_settings_of_a_model_do_not_change_its_samples(tiny_llama, tokenizer, prompts):
    before = generate(tiny_llama, tokenizer, prompts, WARM)
    own = tiny_llama.generation_config
    own.update(repetition_penalty=5.0, top_k=1, max_length=4, do_sample=True, temperature=0.1)
    assert generate(tiny_llama, tokenizer, prompts, WARM) == before
    assert tiny_llama.generation_config is own


def test_the_state_of_a_model_in_training_is_restored(
    save_base: Callable[..., PreTrainedModel],
    make_recipe: Callable[..., object],
    load: Callable[[object], Policy],
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
):
    save_base()
    policy = load(make_recipe(lora={"r": 4}))
    expected = generate(policy.causal, tokenizer, prompts, GREEDY)
    set_gradient_checkpointing(policy.causal, True)
    Scorer(policy.model, policy.causal, ProbeResult("shared", True, ""))
    policy.model.train()
    policy.causal.model.layers[0].eval()
    assert generate(policy.causal, tokenizer, prompts, GREEDY) == expected
    assert policy.causal.config._attn_implementation == SHARED_PREFIX
    assert policy.causal.is_gradient_checkpointing
    assert policy.causal.training
    assert not policy.causal.model.layers[0].training
    assert policy.causal.config.use_cache is False
    with policy.reference():
        assert generate(policy.causal, tokenizer, prompts, GREEDY) == expected


def test_adapters_in_float32_over_a_narrow_base_compute_in_its_precision(save_base, make_recipe, load, tokenizer):
    save_base()
    policy = load(make_recipe(model={"dtype": "bfloat16"}, lora={"r": 4}))
    assert generate(policy.causal, tokenizer, [[5, 6, 7]], WARM)[0].text
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("model_type", ["mistral", "qwen3", "gemma3_text", "mixtral", "gpt2", "mamba"])
def test_padding_on_the_left_changes_no_text(tiny_model, tokenizer, prompts, model_type):
    changes = {"gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4}}.get(model_type, {})
    model = tiny_model(model_type, **changes)
    together = generate(model, tokenizer, prompts, GREEDY)
    assert together == [generate(model, tokenizer, [prompt], GREEDY)[0] for prompt in prompts]


@pytest.mark.parametrize("sampling", [WARM, GREEDY])
def test_a_stream_is_the_same_text_in_pieces(tiny_llama, tokenizer, prompts, sampling):
    for prompt in prompts[:3]:
        pieces = list(stream(tiny_llama, tokenizer, prompt, sampling))
        assert "".join(pieces) == generate(tiny_llama, tokenizer, [prompt], sampling)[0].text


def test_closing_a_stream_stops_the_model(tiny_llama, tokenizer):
    steps = []
    tiny_llama.register_forward_hook(lambda *_: steps.append(1))
    pieces = stream(tiny_llama, tokenizer, [5, 6], SamplingParams(max_new_tokens=400, temperature=1.0, top_p=1.0))
    next(pieces)
    pieces.close()
    assert len(steps) < 400


def test_a_failure_inside_a_stream_reaches_the_reader(tiny_llama, tokenizer, monkeypatch):
    def fail(*_):
        raise ValueError("broken layer")

    tiny_llama.model.layers[0].register_forward_hook(fail)
    with pytest.raises(ValueError, match="broken layer"):
        list(stream(tiny_llama, tokenizer, [5, 6], GREEDY))


def test_a_prompt_that_fills_the_context_or_is_empty_is_refused(tiny_llama, tokenizer):
    message = "a prompt of 512 tokens leaves no room for a response: the model's context is 512 tokens"
    with pytest.raises(RunError, match=f"^{message}$"):
        generate(tiny_llama, tokenizer, [[5] * 512], GREEDY)
    with pytest.raises(RunError, match=r"^a prompt is empty$"):
        generate(tiny_llama, tokenizer, [[5], []], GREEDY)
    assert len(generate(tiny_llama, tokenizer, [[5] * 510], GREEDY)) == 1


def test_progress_counts_every_prompt(tiny_llama, tokenizer, prompts):
    counts: list[int] = []
    generate(tiny_llama, tokenizer, prompts, SamplingParams(2, batch_size=3), on_batch=counts.append)
    assert counts == [3, 3, 1]
    assert generate(tiny_llama, tokenizer, [], WARM) == []
