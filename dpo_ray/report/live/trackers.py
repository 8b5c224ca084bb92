"""Adapters for experiment trackers. Each imports its package when it is built, in the process of ``follower``."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import yaml

Row = Mapping[str, Any]
"""A pair of a round: round, prompt, chosen, rejected, chosen_score, rejected_score."""

PROJECT = "dpo-ray"
"""Default name of the W&B or Trackio project, or of the MLflow experiment."""


class Tracker(Protocol):
    """A run in a tracker, called from one thread.

    Built with ``run.tracker_args[name]`` and with those of these arguments that its signature has: ``name``, ``group``
    (the sweep or None), ``folder`` (run directory; None in an object store), ``config`` (secrets masked), ``id`` (of
    the run to continue, or None) and ``next_step`` (the first step that a continued run lacks).
    """

    id: str
    """Stored in trackers.json; a resumed run continues the tracker's run of this id."""
    location: str
    """URL of the run, or the command that shows it."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics. Steps never decrease; held-out metrics follow the training metrics of their step."""

    def log_samples(self, rows: Sequence[Row], step: int) -> None:
        """Log the first pairs of the round that ended with ``step``."""

    def close(self, *, failed: bool) -> None:
        """Flush and end the run."""


class _TensorBoard:
    def __init__(
        self, *, folder: Path | None, config: Row, id: str | None, next_step: int, log_dir: str | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = log_dir or f"{folder}/tensorboard"
        self.location = f"tensorboard --logdir {self.id}"
        # purge_step hides events that a killed process wrote after the last recorded step.
        self.writer = SummaryWriter(self.id, purge_step=next_step if id else None)
        if id is None:
            lines = yaml.safe_dump(config, sort_keys=False).splitlines()
            self.writer.add_text("config", "".join(f"    {line}\n" for line in lines), 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def log_samples(self, rows: Sequence[Row], step: int) -> None:
        cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row.values()] for row in rows]
        table = [list(rows[0]), ["---"] * len(rows[0]), *cells]
        self.writer.add_text("samples", "\n".join(f"| {' | '.join(line)} |" for line in table), step)

    def close(self, *, failed: bool) -> None:
        self.writer.close()


class _WandB:
    def __init__(
        self, *, name: str, group: str | None, folder: Path | None, config: Row, id: str | None, **args: Any
    ) -> None:
        import wandb

        if folder and "WANDB_DIR" not in os.environ:
            args = {"dir": str(folder), **args}
        args = {"project": PROJECT, "name": name, "group": group, "config": config, **args}
        self.wandb, self.run = wandb, wandb.init(id=id, resume="allow", **args)
        # The x-axis is a metric: wandb drops lines whose own step does not increase.
        self.run.define_metric("*", step_metric="step")
        self.id, self.location = self.run.id, self.run.url or f"wandb sync {Path(self.run.dir).parent}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log({**metrics, "step": step})

    def log_samples(self, rows: Sequence[Row], step: int) -> None:
        table = self.wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.run.log({"samples": table, "step": step})

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _MLflow:
    def __init__(
        self,
        *,
        name: str,
        group: str | None,
        config: Row,
        id: str | None,
        tracking_uri: str | None = None,
        experiment: str = PROJECT,
    ) -> None:
        import mlflow
        import pandas

        if tracking_uri:
            mlflow.set_tracking_uri(tracking_uri)
        mlflow.set_experiment(experiment)
        run = mlflow.start_run(run_id=id, run_name=name, tags={"group": group} if group else None)
        self.mlflow, self.id = mlflow, run.info.run_id
        self.location = f"{mlflow.get_tracking_uri()}, experiment {experiment}, run {self.id}"
        if id is None:
            mlflow.log_params(pandas.json_normalize(dict(config)).iloc[0].to_dict())
        mlflow.log_dict(dict(config), "config.yaml")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(metrics), step=step)

    def log_samples(self, rows: Sequence[Row], step: int) -> None:
        # A file per round: mlflow appends by downloading and rewriting the whole table.
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        self.mlflow.log_table(columns, f"samples/round_{rows[0]['round']:06d}.json")

    def close(self, *, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


class _Trackio:
    def __init__(self, *, name: str, group: str | None, config: Row, id: str | None, **args: Any) -> None:
        import trackio

        # Trackio resumes the latest run of a name, so that the name must be unique.
        name = id or f"{name}-{uuid4().hex[:6]}"
        args = {"project": PROJECT, "group": group, "config": config, "embed": False, **args}
        self.trackio, self.run = trackio, trackio.init(name=name, resume="allow", **args)
        self.id, self.location = self.run.name, f"trackio show --project {self.run.project}, run {self.run.name}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def log_samples(self, rows: Sequence[Row], step: int) -> None:
        table = self.trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.run.log({"samples": table}, step=step)

    def close(self, *, failed: bool) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow, "trackio": _Trackio}
