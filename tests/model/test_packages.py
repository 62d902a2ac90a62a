"""A package that is missing is named with the command that installs it, whatever a library says."""

import base64
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpoctl.errors import SetupError
from dpoctl.model import packages
from dpoctl.model.source import ModelSource, find_source, first_line, reading_model
from dpoctl.model.tokenizer import read_tokenizer

Without = Callable[..., None]
TIKTOKEN = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Without:
    """Act as if some modules were not installed."""

    def hide(*names: str) -> None:
        def find(name: str) -> Any:
            return None if name in names else importlib.util.find_spec(name)

        monkeypatch.setattr(packages, "find_spec", find)

    return hide


@pytest.fixture
def slow(tmp_path: Path, save_base: Any) -> Callable[[str, bytes], ModelSource]:
    """A model folder whose tokenizer is one file that transformers cannot read."""

    def save(name: str, content: bytes) -> ModelSource:
        save_base("llama")
        (tmp_path / "base" / "tokenizer.json").unlink()
        kind = "T5Tokenizer" if name == "spiece.model" else "LlamaTokenizer"
        (tmp_path / "base" / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{kind}"}}')
        (tmp_path / "base" / name).write_bytes(content)
        return find_source(str(tmp_path / "base"))

    return save


@pytest.mark.parametrize(
    ("file", "content", "hidden", "said"),
    [
        (
            "tokenizer.model", b"\n\x0e\n\x05<unk>", ["sentencepiece"],
            "(tokenizer.model) needs sentencepiece, which is not installed; pip install 'dpoctl[sentencepiece]'",
        ),
        (
            "tokenizer.model", b"\n\x0e\n\x05<unk>", ["sentencepiece", "google.protobuf"],
            "needs sentencepiece and protobuf, which are not installed; pip install 'dpoctl[sentencepiece]'",
        ),
        ("spiece.model", b"\n\x0e\n\x05<unk>", ["google.protobuf"], "(spiece.model) needs protobuf, which is not"),
        (
            "tokenizer.model", TIKTOKEN, ["tiktoken"],
            "(tokenizer.model) needs tiktoken, which is not installed; pip install tiktoken",
        ),
    ],
)  # fmt: skip
def test_a_tokenizer_file_names_the_package_that_reads_it(
    file: str, content: bytes, hidden: list[str], said: str, slow: Any, without: Without
) -> None:
    source = slow(file, content)
    without(*hidden)
    with pytest.raises(SetupError) as caught:
        read_tokenizer(source)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"the tokenizer of model '{source.name}' ")


def test_a_tokenizer_that_is_damaged_needs_no_package(slow: Any) -> None:
    with pytest.raises(SetupError, match=r"\(tokenizer\.model\) cannot be read: the file is damaged"):
        read_tokenizer(slow("tokenizer.model", b"\n\x0e\n\x05<unk>"))


def test_a_tokenizer_without_its_vocabulary_is_refused(slow: Any) -> None:
    with pytest.raises(SetupError, match="has no vocabulary: a file is missing"):
        read_tokenizer(slow("vocabulary.bin", b"elsewhere"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ImportError(
                "\nLlamaTokenizer requires the SentencePiece library but it was not found in your environment. "
                "Check out the instructions on the\ninstallation page of its repo"
            ),
            "needs sentencepiece, which is not installed; pip install 'dpoctl[sentencepiece]'",
        ),
        (
            ImportError(
                "This modeling file requires the following packages that were not found in your environment: "
                "einops, flash_linear. Run `pip install einops flash_linear`"
            ),
            "needs einops and flash_linear, which are not installed; pip install einops flash_linear",
        ),
        (ModuleNotFoundError("No module named 'triton.ops'", name="triton.ops"), "; pip install triton"),
        (ImportError("Using `bitsandbytes` 4-bit needs it: `pip install -U bitsandbytes>=0.46.1`"), "'dpoctl[quant]'"),
        (ValueError("`optimum` is required to load a quantized model"), "pip install optimum"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_errors_of_libraries_name_what_to_install(error: Exception, said: str, without: Without) -> None:
    without("sentencepiece", "einops", "flash_linear", "triton", "bitsandbytes", "optimum")
    with pytest.raises(SetupError) as caught, reading_model("my/model"):
        raise error
    assert said in str(caught.value)
    assert str(caught.value).startswith("model 'my/model' needs ")


def test_a_package_that_is_there_is_not_what_is_missing() -> None:
    said = r"^model 'my/model' cannot be loaded: `torch` is required to do that$"
    with pytest.raises(SetupError, match=said), reading_model("my/model"):
        raise ValueError("`torch` is required to do that.")


def test_a_line_that_announces_others_is_followed_by_them() -> None:
    assert first_line(ValueError("Could not read one of:\n (1) a file,\n (2) another.\n")) == (
        "Could not read one of: (1) a file, (2) another"
    )
    assert first_line(ValueError("Could not.\nMore.")) == "Could not"
    assert len(first_line(ValueError("One of:\n" + "many " * 500))) < 420
