"""Our steps against TRL's trainers: losses, rewards, log-probabilities and gradient norms, through all steps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import WritePairs, ragged_texts
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline
from tests.oracles.trl_run import trl_kto_steps, trl_simpo_steps, trl_steps

SAME_NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
PAIRS_PER_STEP, LR, BETA = 4, 5e-4, 0.1


def our_steps(
    ranks: int,
    tmp_path: Path,
    model: Path,
    pairs: Path,
    loss: dict[str, Any],
    lora: dict[str, Any] | None = None,
    *,
    lr: float = LR,
    tokens_per_micro_batch: int = 300,
    epochs: int = 1,
) -> list[dict[str, Any]]:
    """Metrics of our run, four pairs per step, in float32."""
    config = {
        "run": {"dir": str(tmp_path), "save_every": None, "export": False, "epochs": epochs},
        "model": {"path": str(model), "dtype": "float32", "lora": lora},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "data": {"train": str(pairs), "shuffle": False, "strings": "raw"},  # as TRL uses strings
        "loss": {"beta": BETA, **loss},
        "optim": {"lr": lr, "pairs_per_step": PAIRS_PER_STEP, "tokens_per_micro_batch": tokens_per_micro_batch},
        "cluster": {"train_workers": ranks},
    }
    return run_ranks(ranks, offline, config)[0]


def assert_same_steps(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], names: Sequence[str] = SAME_NAMES
) -> None:
    assert len(ours) == len(theirs) >= 3
    for mine, other in zip(ours, theirs, strict=True):
        for name in names:
            # TRL logs four decimals or digits.
            assert mine[name] == pytest.approx(float(other[name]), rel=1e-3, abs=1e-4), (mine["step"], name)
        assert mine["optim/grad_norm"] == pytest.approx(float(other["grad_norm"]), rel=1e-3), mine["step"]
        assert mine["optim/lr"] == pytest.approx(float(other["learning_rate"]), rel=1e-6)
    assert ours[-1]["loss"] != pytest.approx(ours[0]["loss"], rel=1e-2), "runs that do not learn compare nothing"


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_step_is_that_of_trls_trainer(
    ranks: int, tmp_path: Path, tiny_model: Path, write_pairs: WritePairs
) -> None:
    file = write_pairs(ragged_texts(24))
    ours = our_steps(ranks, tmp_path, tiny_model, file, {})
    records = [json.loads(line) for line in file.read_text().splitlines()]
    theirs = trl_steps(tiny_model, records, folder=tmp_path / "trl", pairs_per_step=PAIRS_PER_STEP, lr=LR, beta=BETA)
    assert_same_steps(ours, theirs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"use": "sigmoid_norm"}, {"loss_type": "sigmoid_norm"}),
        ({"use": "robust", "args": {"label_smoothing": 0.1}}, {"loss_type": "robust", "label_smoothing": 0.1}),
        ({"use": "hinge"}, {"loss_type": "hinge"}),
        ({"use": "ipo"}, {"loss_type": "ipo"}),
        ({"use": "exo_pair", "args": {"label_smoothing": 0.01}}, {"loss_type": "exo_pair", "label_smoothing": 0.01}),
        ({"use": "nca_pair"}, {"loss_type": "nca_pair"}),
        ({"use": "sppo_hard"}, {"loss_type": "sppo_hard"}),
        ({"use": "apo_zero"}, {"loss_type": "apo_zero"}),
        ({"use": "apo_down"}, {"loss_type": "apo_down"}),
        ({"use": "discopop"}, {"loss_type": "discopop", "discopop_tau": 0.05}),
        (
            {
                "use": ["aot", "aot_unpaired", "bco_pair"],
                "weights": [1.0, 0.5, 2.0],
                "args": {"bco_pair": {"shift": False}},
            },
            {"loss_type": ["aot", "aot_unpaired", "bco_pair"], "loss_weights": [1.0, 0.5, 2.0]},
        ),
        ({"use": "sigmoid", "divergence": "forward_kl"}, {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"}),
        ({"use": "ipo", "divergence": "js"}, {"loss_type": "ipo", "f_divergence_type": "js_divergence"}),
        # TRL's coefficient is 1 for the reverse KL divergence and 0 for the forward one.
        (
            {"use": "hinge", "divergence": 0.3},
            {"loss_type": "hinge", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        ),
        ({"use": "sigmoid", "weighting": "wpo"}, {"loss_type": "sigmoid", "use_weighting": True}),
        # TRL's SFT term is the mean over the tokens of a micro-batch, RPO's over those of a pair: equal at one pair.
        (
            {"use": ["sigmoid", "nll"], "weights": [1.0, 0.5]},
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "pairs_per_micro_batch": 1},
        ),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_loss_trains_as_in_trl(
    ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path, tiny_model: Path, write_pairs: WritePairs
) -> None:
    file = write_pairs(ragged_texts(12))
    records = [json.loads(line) for line in file.read_text().splitlines()]
    steps = trl_steps(
        tiny_model, records, folder=tmp_path / "trl", pairs_per_step=PAIRS_PER_STEP, lr=LR, beta=BETA, **theirs
    )
    assert_same_steps(our_steps(1, tmp_path, tiny_model, file, ours), steps)


def test_simpo_trains_as_in_trl(tmp_path: Path, tiny_model: Path) -> None:
    # Plain text: TRL's CPO trainer appends a second end of sequence to a chat template's end of turn.
    records = [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in ragged_texts(12)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    theirs = trl_simpo_steps(
        tiny_model, records, folder=tmp_path / "trl", pairs_per_step=PAIRS_PER_STEP, lr=LR, beta=2.0, gamma=0.5
    )
    ours = our_steps(1, tmp_path, tiny_model, file, {"use": "simpo", "beta": 2.0, "args": {"gamma": 0.5}})
    assert_same_steps(ours, theirs, ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"))
    assert not (tmp_path / "cache" / "reference").exists(), "SimPO uses no reference"


@pytest.mark.parametrize("ranks", [1, 2])
def test_kto_trains_as_in_trl(ranks: int, tmp_path: Path, tiny_model: Path) -> None:
    records = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": answer}],
            "label": i != 1,
        }
        for i, (prompt, answer, _) in enumerate(ragged_texts(PAIRS_PER_STEP))
    ]
    file = tmp_path / "labeled.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    weights = {"desirable_weight": 0.5, "undesirable_weight": 2.0}
    # Ours pairs a prompt with the completion of the next record, TRL with the one before: the same in reverse order.
    theirs = trl_kto_steps(tiny_model, records[::-1], folder=tmp_path / "trl", lr=0.01, epochs=4, beta=BETA, **weights)
    ours = our_steps(ranks, tmp_path, tiny_model, file, {"use": "kto", "args": weights}, lr=0.01, epochs=4)
    assert max(float(step["kl"]) for step in theirs) > 1, "the estimate counts"
    assert_same_steps(ours, theirs, ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"))


def test_adapters_train_as_in_trl(tmp_path: Path, tiny_model: Path, write_pairs: WritePairs) -> None:
    file = write_pairs(ragged_texts(12))
    lora = {"rank": 4, "alpha": 16}
    start = {
        "run": {"dir": str(tmp_path), "name": "start", "steps": 1, "save_every": None},
        "model": {"path": str(tiny_model), "dtype": "float32", "lora": lora},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "data": {"train": str(file)},
        "optim": {"lr": 1e-30},
    }
    run_ranks(1, offline, start)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    theirs = trl_steps(
        tiny_model,
        records,
        folder=tmp_path / "trl",
        pairs_per_step=PAIRS_PER_STEP,
        lr=LR,
        beta=BETA,
        adapter=tmp_path / "start/adapter",
    )
    assert_same_steps(our_steps(2, tmp_path, tiny_model, file, {}, lora), theirs)
