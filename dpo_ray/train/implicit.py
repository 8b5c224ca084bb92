"""Judging a round by the implicit reward of DPO, which needs the log-probabilities of policy and reference."""

from dpo_ray.config.rounds import JudgeConfig
from dpo_ray.model.scorer import LogpsModel
from dpo_ray.rollout.judges.implicit import Implicit
from dpo_ray.rollout.ledger import RoundData
from dpo_ray.train.logps import compute_sample_logps
from dpo_ray.train.rounds import Rounds
from dpo_ray.train.trainer import Trainer


def judge_by_policy(
    trainer: Trainer, rounds: Rounds, data: RoundData, frozen: LogpsModel, judge: JudgeConfig
) -> RoundData:
    """The round with the pairs that follow from its implicit rewards; at once if it has been judged before."""
    if data.judged:
        return data
    samples = rounds.samples(data.index)
    if data.index == 0:  # the policy is the reference, and the length alone would decide
        return rounds.judge(0, [0.0] * len(samples))
    policy, reference = (compute_sample_logps(trainer, model, samples) for model in (trainer.policy, frozen))
    tokens = samples.lengths[:, 1]
    scores = Implicit(**judge.args).scores(policy, reference, tokens, beta=trainer.config.loss.beta)
    return rounds.judge(data.index, scores.tolist())
