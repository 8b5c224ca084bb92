"""Shows the records that a run would train on; the same as ``dpo-ray inspect``.

python -m jobs.inspect CONFIG.yaml [key=value ...] [--json FILE]
"""

import sys

from dpo_ray.cli import main

if __name__ == "__main__":
    main(["inspect", *sys.argv[1:]])
