"""A checkpoint as a Hugging Face directory.

    python -m jobs.export runs/dpo exported                      the run's newest checkpoint
    python -m jobs.export runs/dpo exported --best               the one with the best run.best_metric
    python -m jobs.export runs/dpo/checkpoints/000120 exported

Of a run with adapters it is a peft directory, or with --merge the model with the adapters added in.
"""

import argparse
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run directory, or a checkpoint in one")
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    parser.add_argument("--best", action="store_true", help="of a run directory, the best checkpoint, not the newest")
    parser.add_argument("--merge", action="store_true", help="add adapters to the model")
    arguments = parser.parse_args()

    from dpo_ray.launch.command import run_command
    from dpo_ray.train.export import export_checkpoint, find_checkpoint

    def export() -> None:
        checkpoint = find_checkpoint(arguments.source, best=arguments.best)
        export_checkpoint(checkpoint, arguments.folder, merge=arguments.merge)
        print(f"{checkpoint} is written to {arguments.folder}")

    run_command(export)
