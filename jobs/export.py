"""A checkpoint as a Hugging Face directory; the same as ``dpo-ray export``.

python -m jobs.export SOURCE FOLDER [--best] [--merge]
"""

import sys

from dpo_ray.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
