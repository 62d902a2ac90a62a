"""Small real things that tests share: a tokenizer trained in the process, and tiny models."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# A shell that starts the tests in the background lets them, and so all that they start, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("whole")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The paper proposes a method and the reviewer sighs. ",
    "Human: what is the capital of France? Assistant: Paris, of course. ",
    "system user assistant 0123456789 hello world, yes no maybe!\n\n",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-fake-cuda", action="store_true", help="where no fake GPU can be built, fail")
    parser.addoption("--all-faults", action="store_true", help="all cases of the tests that play a sample of theirs")
    parser.addoption("--update-messages", action="store_true", help="rewrite the expected texts in tests/messages")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all-faults"):
        settings.load_profile("whole")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what a marker `long` names, a whole test or some of its cases, but for `--all-faults`."""
    if config.getoption("--all-faults"):
        return
    for item in items:
        for mark in item.iter_markers("long"):
            if not mark.args or (isinstance(item, pytest.Function) and item.callspec.id in mark.args):
                item.add_marker(pytest.mark.skip(reason="in the whole suite only"))


def _check_descriptor(descriptor: int) -> None:
    """Take the place of `os.fsync`: no test cuts the power, and a disk that is waited for takes half of the time."""
    os.fstat(descriptor)


os.fsync = _check_descriptor


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether every case is played, or a sample of them."""
    return bool(request.config.getoption("--all-faults"))


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees another's token stores, nor the user's."""
    monkeypatch.setenv("DPOCTL_CACHE", str(tmp_path / "dpoctl-cache"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens with ChatML's control tokens and template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    core.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = CHATML
    return fast


TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def build_tiny(model_type: str, **changes: Any) -> PreTrainedModel:
    """A two-layer model of an architecture with seeded weights large enough to make errors show."""
    config = transformers.AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 384,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 3,
            "initializer_range": 0.1,
        }
        | TINY.get(model_type, {})
        | changes,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Build a tiny model by its model type."""
    return build_tiny


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """A two-layer Llama."""
    return build_tiny("llama")


@pytest.fixture
def tiny_llama_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama and its tokenizer saved as a user would have them."""
    folder = tmp_path / "tiny-llama"
    build_tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
