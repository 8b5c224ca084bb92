"""The ``dpo-ray`` command. In a checkout, ``python -m jobs.NAME ...`` is the same as ``dpo-ray NAME ...``.

Each command is a function whose docstring is its usage. Pydantic, torch and Ray are imported inside the functions, so
that ``dpo-ray --help`` and errors in the arguments appear at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from inspect import cleandoc

BAD_INPUT, INTERRUPTED = 2, 130


def offline(arguments: Sequence[str]) -> None:
    """Train with DPO on a fixed preference set.

    dpo-ray offline CONFIG.yaml [key=value ...]
    dpo-ray offline jobs/offline_demo.yaml optim.lr=1e-6 loss.beta=0.05
    """
    from dpo_ray.config import OFFLINE, config_from_argv

    config = config_from_argv(_usage(offline), OFFLINE, arguments)

    from dpo_ray.launch.command import run_command, run_on_cluster

    run_command(run_on_cluster, "dpo_ray.launch.offline:run_offline", config)


def online(arguments: Sequence[str]) -> None:
    """Train with iterative or online DPO: rounds of generate, judge, select, train.

    dpo-ray online CONFIG.yaml [key=value ...]
    dpo-ray online jobs/demo.yaml online.rounds=3 online.judge.use=my_lab.judges:helpful
    """
    from dpo_ray.config import ONLINE, config_from_argv

    config = config_from_argv(_usage(online), ONLINE, arguments)

    from dpo_ray.launch.command import run_command, run_on_cluster
    from dpo_ray.rollout.judges import bind_judge
    from dpo_ray.rollout.selectors import build_selector

    def run() -> None:
        assert config.online is not None
        bind_judge(config.online.judge)
        if config.online.eval_judge is not None:
            try:
                bind_judge(config.online.eval_judge)
            except ValueError as error:
                raise ValueError(str(error).replace("online.judge.", "online.eval_judge.")) from None
        build_selector(config.online.select)
        run_on_cluster("dpo_ray.launch.online:run_online", config, engines=config.cluster.rollout_engines)

    run_command(run)


def sweep(arguments: Sequence[str]) -> None:
    """Run many trials over a search space and compare them on held-out data.

    dpo-ray sweep CONFIG.yaml SPACE [key=value ...]
    dpo-ray sweep jobs/offline_demo.yaml beta_lr sweep.samples=8
    dpo-ray sweep jobs/offline_demo.yaml beta_lr sweep.scheduler.use=asha sweep.search.use=sobol run.eval_every=10

    SPACE is a module of tune_spaces, or any importable module with a SWEEP. Trials are offline runs, or online runs if
    CONFIG.yaml has an online section. The same command continues a sweep that was interrupted.
    """
    from dpo_ray.config import config_from_argv, sweep_command

    space = arguments[1] if len(arguments) > 1 else ""
    asks_for_help = {"-h", "--help"} & set(arguments)
    config = config_from_argv(
        _usage(sweep), sweep_command, arguments if asks_for_help else [*arguments[:1], *arguments[2:]]
    )

    from dpo_ray.launch.cluster import runs_that_fit
    from dpo_ray.launch.command import run_command, run_on_cluster
    from dpo_ray.sweep.spaces import find_space

    def run() -> None:
        find_space(space)
        engines = config.cluster.rollout_engines if config.online is not None else 0
        runs = config.sweep.concurrent or runs_that_fit(config.cluster, engines)
        run_on_cluster("dpo_ray.launch.sweep:run_sweep", config, space, engines=engines, local_runs=runs)

    run_command(run)


def export(arguments: Sequence[str]) -> None:
    """Export a checkpoint as a Hugging Face directory.

    dpo-ray export runs/dpo exported                      the newest checkpoint of the run
    dpo-ray export runs/dpo exported --best               the checkpoint with the best run.best_metric
    dpo-ray export runs/dpo/checkpoints/000120 exported
    dpo-ray export s3://bucket/runs/dpo exported          from an object store, or to one

    A run with adapters exports a peft directory, or with --merge the model with the adapters merged into it.
    """
    parser = argparse.ArgumentParser(
        "dpo-ray export", description=_usage(export), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a run directory, or a checkpoint in one")
    parser.add_argument("folder", help="output directory; must not exist")
    parser.add_argument("--best", action="store_true", help="export the best checkpoint of the run, not the newest")
    parser.add_argument("--merge", action="store_true", help="merge adapters into the model")
    options = parser.parse_args(arguments)

    from dpo_ray.warnings_filter import filter_import_warnings

    filter_import_warnings()
    from dpo_ray.launch.command import run_command
    from dpo_ray.storage import folder_at, storage_errors
    from dpo_ray.train.export import export_checkpoint, find_checkpoint

    def run() -> None:
        source, folder = folder_at(options.source), folder_at(options.folder)
        with storage_errors(source):
            checkpoint = find_checkpoint(source, best=options.best)
            export_checkpoint(checkpoint, folder, merge=options.merge)
        print(f"exported {checkpoint} to {options.folder}")

    run_command(run)


def inspect(arguments: Sequence[str]) -> None:
    """Show what a run would train on: the data report, and records as the model reads them. Starts no cluster.

    dpo-ray inspect CONFIG.yaml [key=value ...] [--json FILE] [--records N]
    dpo-ray inspect jobs/offline_demo.yaml data.strings=raw --json records.jsonl

    --json FILE writes one object per record: key, source, number, status, reason, detail, notes, prompt, chosen and
    rejected (decoded with special tokens), and counts of tokens. --records N prints N records of each set (default 3).
    Text in guillemets was added by the chat template or the tokenizer.
    """
    from pathlib import Path

    from dpo_ray.config import INSPECT, config_from_argv

    parser = argparse.ArgumentParser("dpo-ray inspect", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--records", type=int, default=3)
    options, rest = parser.parse_known_args(arguments)
    config = config_from_argv(_usage(inspect), INSPECT, rest)

    from dpo_ray.warnings_filter import filter_import_warnings

    filter_import_warnings()
    from rich.console import Console

    from dpo_ray.data.inspect import inspect_run
    from dpo_ray.launch.command import run_command

    run_command(inspect_run, config, Console(), json_file=options.json, shown=options.records)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "offline": offline,
    "online": online,
    "sweep": sweep,
    "export": export,
    "inspect": inspect,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand in ``argv`` (default: ``sys.argv[1:]``)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does: judges, losses and search spaces are imported from here
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        try:
            COMMANDS[name](arguments[1:])
        except SystemExit as ended:
            if ended.code != INTERRUPTED:
                raise
            # Threads may still be in calls of Ray, in which Python's own exit would crash the process.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
    elif name in ("-h", "--help"):
        print(_help())
        raise SystemExit(0 if arguments else BAD_INPUT)
    elif name == "--version":
        from importlib.metadata import version

        print(version("dpo-ray"))
    else:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        print(f"error: no command is called {name!r}{hint} Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def _usage(command: Callable[[Sequence[str]], None]) -> str:
    return cleandoc(command.__doc__ or "")


def _help() -> str:
    commands = "".join(f"  {name:10}{_usage(command).splitlines()[0]}\n" for name, command in COMMANDS.items())
    return (
        "Preference tuning of language models on Ray.\n\nusage: dpo-ray COMMAND ...\n\ncommands:\n"
        f"{commands}\ndpo-ray COMMAND --help describes a command and lists every configuration key."
    )
