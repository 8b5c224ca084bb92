"""DPO on a fixed preference set; the same as ``dpo-ray offline``.

python -m jobs.offline CONFIG.yaml [key=value ...]
"""

import sys

from dpo_ray.cli import main

if __name__ == "__main__":
    main(["offline", *sys.argv[1:]])
