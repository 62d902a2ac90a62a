"""The divergence of two models over texts: by hand, whatever else is in the batch."""

from contextlib import nullcontext

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpoctl.model.continuations import continuation_divergences


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, initializer_range=1.0, **sizes))


def test_the_divergence_is_that_of_whole_distributions_after_each_token_of_the_text() -> None:
    one, other = model(1), model(2)
    rows = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 1])]
    found = continuation_divergences(one, lambda: nullcontext(other), rows)
    for (prompt, text), value in zip(rows, found, strict=True):
        ids = torch.tensor([[*prompt, *text]])
        with torch.no_grad():
            p, q = (causal.eval()(ids).logits[0].log_softmax(-1) for causal in (one, other))
        # The distributions of the text's tokens come from the positions before them.
        at = slice(len(prompt) - 1, len(prompt) + len(text) - 1)
        expected = torch.nn.functional.kl_div(q[at], p[at], reduction="sum", log_target=True)
        torch.testing.assert_close(value, float(expected), rtol=1e-4, atol=1e-5)
    assert continuation_divergences(one, lambda: nullcontext(one), rows) == [0.0, 0.0]


def test_no_logits_of_prompts_are_computed_and_a_text_of_no_tokens_has_no_divergence() -> None:
    one, other, widths = model(1), model(2), []
    one.lm_head.register_forward_hook(lambda layer, args, logits: widths.append(logits.shape[1]))
    long = ([1, 2, 3, 4, 5, 6], [7, 8])
    (alone,) = continuation_divergences(one, lambda: nullcontext(other), [long])
    found = continuation_divergences(one, lambda: nullcontext(other), [long, ([1], [])])
    assert widths == [2, 2]
    torch.testing.assert_close(found, [alone, 0.0], rtol=1e-5, atol=1e-6)
    assert continuation_divergences(one, lambda: nullcontext(other), [([1], [])]) == [0.0]


def test_a_model_that_cannot_leave_logits_out_gives_the_same() -> None:
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None):  # type: ignore[no-untyped-def]
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    one, other, rows = model(1), model(2), [([1, 2, 3], [4, 5])]
    plain = Plain(one.config)
    plain.load_state_dict(one.state_dict())
    expected = continuation_divergences(one, lambda: nullcontext(other), rows)
    found = continuation_divergences(plain, lambda: nullcontext(other), rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
