"""Iterative and online DPO: rounds of generate, judge, select, train; the same as ``dpo-ray online``.

python -m jobs.online CONFIG.yaml [key=value ...]
"""

import sys

from dpo_ray.cli import main

if __name__ == "__main__":
    main(["online", *sys.argv[1:]])
