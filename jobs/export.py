"""A checkpoint as a Hugging Face directory.

    python -m jobs.export runs/dpo exported                      the run's newest checkpoint
    python -m jobs.export runs/dpo exported --best               the one with the best run.best_metric
    python -m jobs.export runs/dpo/checkpoints/000120 exported
    python -m jobs.export s3://bucket/runs/dpo exported           from an object store, or to one

Of a run with adapters it is a peft directory, or with --merge the model with the adapters added in.
"""

import argparse

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a run directory, or a checkpoint in one")
    parser.add_argument("folder", help="where to write; must not exist")
    parser.add_argument("--best", action="store_true", help="of a run directory, the best checkpoint, not the newest")
    parser.add_argument("--merge", action="store_true", help="add adapters to the model")
    arguments = parser.parse_args()

    from dpo_ray.warnings_filter import filter_import_warnings

    filter_import_warnings()
    from dpo_ray.launch.command import run_command
    from dpo_ray.storage import folder_at, storage_errors
    from dpo_ray.train.export import export_checkpoint, find_checkpoint

    def export() -> None:
        source, folder = folder_at(arguments.source), folder_at(arguments.folder)
        with storage_errors(source):
            checkpoint = find_checkpoint(source, best=arguments.best)
            export_checkpoint(checkpoint, folder, merge=arguments.merge)
        print(f"{checkpoint} is written to {arguments.folder}")

    run_command(export)
