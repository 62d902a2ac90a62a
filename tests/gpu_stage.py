"""Where the checks of tests/gpu run: on a GPU at real shapes, or on a CPU at toy shape."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

TOY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 32_000,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32_000,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """The device that the checks run on, and the shapes that it can hold."""

    device: torch.device
    rehearsal: bool

    def config(self, shape: str, **changes: Any) -> LlamaConfig:
        """A Llama of a shape; a toy in a rehearsal."""
        size = {**TOY, "num_key_value_heads": 2, "vocab_size": 384} if self.rehearsal else SHAPES[shape]
        return LlamaConfig(**{"max_position_embeddings": 8192, "pad_token_id": 3, **size, **changes})

    def build(self, shape: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
        """A model of random weights on the device."""
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(self.config(shape, **changes), dtype=dtype)
