"""Many short offline trials over a search space, compared on held-out pairs; the same as ``dpo-ray sweep``.

python -m jobs.sweep CONFIG.yaml SPACE [key=value ...]
"""

import sys

from dpo_ray.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
