"""A tiny model that both programs train."""

from pathlib import Path

import pytest
from parity.two_programs import World
from tiny_world import save_llama
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def world(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> World:
    """A tiny Llama, its tokenizer, and a folder."""
    return World(tmp_path, save_llama(tmp_path / "tiny", tokenizer), tokenizer)
