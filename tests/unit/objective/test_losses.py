"""The losses against numbers a reader can recompute."""

import math
import re
from dataclasses import replace
from math import exp, expm1, log, log1p
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dpo_ray.config.losses import STEP_LOSSES, UNPAIRED_LOSSES, LossConfig
from dpo_ray.objective.build import build_loss
from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import LOSSES, kl_estimate, rank_matches, sigmoid
from dpo_ray.objective.metrics import pair_metric_sums, pair_results
from dpo_ray.types import PAIR_METRICS
from tests.conftest import gradient


def pairs(chosen: list[float], rejected: list[float]) -> PairLogps:
    lengths = torch.ones(len(chosen), dtype=torch.int64)
    return PairLogps(torch.tensor(chosen), torch.tensor(rejected), lengths, lengths)


def test_sigmoid_is_ln_2_where_policy_and_reference_agree() -> None:
    same = pairs([-5.0, -80.0], [-7.0, -3.0])
    assert sigmoid(same, same, beta=0.1).tolist() == pytest.approx([math.log(2)] * 2)


def test_sigmoid_is_the_softplus_of_the_negative_margin() -> None:
    # log-ratios: chosen -10 - -12 = 2, rejected -20 - -15 = -5; margin 0.5 * 7 = 3.5; loss ln(1 + e^-3.5) = 0.029750
    loss = sigmoid(pairs([-10.0], [-20.0]), pairs([-12.0], [-15.0]), beta=0.5)
    assert loss.item() == pytest.approx(0.029750, abs=1e-6)


def test_label_smoothing_mixes_in_the_flipped_preference() -> None:
    policy, reference = pairs([-10.0], [-20.0]), pairs([-12.0], [-15.0])
    kept, flipped = math.log1p(math.exp(-3.5)), math.log1p(math.exp(3.5))
    loss = sigmoid(policy, reference, beta=0.5, label_smoothing=0.2)
    assert loss.item() == pytest.approx(0.8 * kept + 0.2 * flipped, rel=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_outside_its_range_is_rejected(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing.*\[0, 0\.5\)"):
        sigmoid(pairs([0.0], [0.0]), pairs([0.0], [0.0]), beta=0.1, label_smoothing=smoothing)


# One pair: chosen 4 tokens, policy -10, reference -12; rejected 5 tokens, policy -20, reference -15; beta 0.5.
# Log-ratios 2 and -5, rewards 1 and -2.5, margin of rewards 3.5; log-ratios per token 0.5 and -1, margin 1.5;
# log-probabilities per token -2.5 and -4.


def s(x: float) -> float:
    """The logistic function."""
    return 1 / (1 + exp(-x))


def softplus(x: float) -> float:
    """-log of the logistic function of -x."""
    return log1p(exp(x))


@pytest.mark.parametrize(
    ("use", "args", "expected"),
    [
        ("sigmoid", {}, softplus(-3.5)),
        ("sigmoid", {"label_smoothing": 0.2}, 0.8 * softplus(-3.5) + 0.2 * softplus(3.5)),
        ("sigmoid_norm", {}, softplus(-0.75)),
        ("robust", {"label_smoothing": 0.2}, (0.8 * softplus(-3.5) - 0.2 * softplus(3.5)) / 0.6),
        ("hinge", {}, 0.0),  # the margin of 3.5 is beyond 1
        ("ipo", {}, (1.5 - 1.0) ** 2),
        (
            "exo_pair",
            {"label_smoothing": 0.1},
            s(3.5) * (log(s(3.5)) - log(0.9)) + s(-3.5) * (log(s(-3.5)) - log(0.1)),
        ),
        ("nca_pair", {}, softplus(-1) + 0.5 * softplus(1) + 0.5 * softplus(-2.5)),
        ("sppo_hard", {}, (2 - 1) ** 2 + (-5 + 1) ** 2),
        ("apo_zero", {}, 1 - s(1) + s(-2.5)),
        ("apo_down", {}, s(1) + 1 - s(3.5)),
        ("discopop", {"temperature": 2.0}, (1 - s(1.75)) * softplus(-3.5) + s(1.75) * exp(-3.5)),
        ("dpop", {}, softplus(-3.5)),  # chosen is likelier than under the reference: no penalty
        ("bco_pair", {"shift": False}, softplus(-1) + softplus(-2.5)),
        # Alone in its step, a pair has its own ranks.
        ("aot", {"label_smoothing": 0.2}, 0.8 * softplus(-3.5) + 0.2 * softplus(3.5)),
        ("aot_unpaired", {"label_smoothing": 0.2}, 0.8 * softplus(-3.5) + 0.2 * softplus(3.5)),
        ("simpo", {"gamma": 0.25}, softplus(-(0.5 * 1.5 - 0.25))),
        ("orpo", {}, 2.5 + 0.5 * softplus(-(1.5 - log(-expm1(-2.5)) + log(-expm1(-4))))),
        ("nll", {}, 2.5),
    ],
)
def test_each_loss_is_its_papers_formula(use: str, args: dict[str, float], expected: float) -> None:
    loss = build_loss(LossConfig(use=use, beta=0.5, args=args))
    policy, reference = pair(-10.0, -20.0), pair(-12.0, -15.0)
    reference = replace(reference, of_step=rank_matches(policy, reference))
    assert loss(policy, reference).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


# The ratios of policy to reference are t = e^2 and e^-5 of the completions above.
@pytest.mark.parametrize(
    ("divergence", "chosen", "rejected"),
    [
        ("forward_kl", 1 - exp(-2), 1 - exp(5)),
        ("js", log(2 * exp(2) / (exp(2) + 1)), log(2 * exp(-5) / (exp(-5) + 1))),
        (0.25, (1 - exp(-0.5)) / 0.25, (1 - exp(1.25)) / 0.25),
        (1e-4, 2.0, -5.0),  # reverse KL is the limit at 0
        (1 - 1e-6, 1 - exp(-2), 1 - exp(5)),  # and forward KL at 1
    ],
)
def test_a_divergence_replaces_the_log_ratios(divergence: str | float, chosen: float, rejected: float) -> None:
    policy, reference = pair(-10.0, -20.0), pair(-12.0, -15.0)
    several = LossConfig(use=("hinge", "ipo", "nll"), beta=0.001, divergence=divergence)  # type: ignore[arg-type]
    hinge, ipo, nll = 1 - 0.001 * (chosen - rejected), (chosen / 4 - rejected / 5 - 500) ** 2, 2.5
    assert build_loss(several)(policy, reference).item() == pytest.approx(hinge + ipo + nll, rel=2e-4)


def test_a_divergence_of_a_completion_far_below_the_reference_stays_finite() -> None:
    loss = build_loss(LossConfig(divergence="forward_kl"))(pair(-500.0, -20.0), pair(-12.0, -15.0))
    assert loss.isfinite().all()


def test_bco_shifts_rewards_by_their_mean_in_former_steps() -> None:
    totals = torch.tensor([0.0, 0.0])
    loss = build_loss(LossConfig(use="bco_pair", beta=0.5), totals)
    policy, reference = pair(-10.0, -20.0), pair(-12.0, -15.0)
    assert loss(policy, reference).item() == pytest.approx(softplus(-1) + softplus(-2.5))
    totals += torch.tensor([6.0, 4.0])  # a mean log-ratio of 1.5, and 0.75 of rewards
    assert loss(policy, reference).item() == pytest.approx(softplus(-0.25) + softplus(-3.25))


def test_kto_compares_each_completion_with_the_kl_divergence_of_the_step() -> None:
    # Log-ratios: desirable 2, beside it 3; undesirable -5, beside it -1. The KL estimate is (3 - 1) / 2 = 1.
    unpaired = torch.tensor([1, -1])
    policy = replace(pairs([-10.0, -6.0], [-12.0, -20.0]), unpaired=unpaired)
    reference = pairs([-12.0, -5.0], [-15.0, -15.0])
    reference = replace(reference, of_step=kl_estimate(policy, reference))
    assert reference.of_step is not None
    assert reference.of_step.tolist() == [[1.0], [1.0]]
    args = {"desirable_weight": 2.0, "undesirable_weight": 3.0}
    losses = build_loss(LossConfig(use="kto", beta=0.5, args=args))(policy, reference)
    assert losses.tolist() == pytest.approx([2 * (1 - s(0.5 * (2 - 1))), 3 * (1 - s(0.5 * (1 + 5)))])


def test_the_kl_estimate_is_not_negative() -> None:
    policy = replace(pairs([-10.0], [-16.0]), unpaired=torch.tensor([1]))
    assert kl_estimate(policy, pairs([-12.0], [-15.0])).tolist() == [[0.0]]


def test_bco_classifies_completions_without_a_pair() -> None:
    policy = replace(pairs([-10.0, 0.0], [0.0, -20.0]), unpaired=torch.tensor([1, -1]))
    reference = pairs([-12.0, 0.0], [0.0, -15.0])  # log-ratios 2 and -5, and those of empty completions
    loss = build_loss(LossConfig(use="bco", beta=0.5), torch.tensor([6.0, 4.0]))  # a mean log-ratio of 1.5
    assert loss(policy, reference).tolist() == pytest.approx([softplus(-0.25), softplus(-3.25)])


def ranked_lists() -> tuple[list[list[float]], PairLogps, PairLogps]:
    """Log-ratios of lists of four, two and three completions, best first; the pairs of neighbors, and a reference."""
    lists = [[0.5, 2.0, -1.0, -3.0], [1.0, 1.5], [-2.0, 0.0, -4.0]]
    chosen = [ratio for ratios in lists for ratio in ratios[:-1]]
    rejected = [ratio for ratios in lists for ratio in ratios[1:]]
    follows = torch.tensor([i > 0 for ratios in lists for i in range(len(ratios) - 1)])
    return lists, replace(pairs(chosen, rejected), follows=follows), pairs([0.0] * len(chosen), [0.0] * len(chosen))


def test_plackett_luce_is_the_likelihood_of_the_rankings() -> None:
    lists, policy, reference = ranked_lists()
    losses = build_loss(LossConfig(use="plackett_luce", beta=0.5))(policy, reference)
    expected = [
        -log(exp(0.5 * ratios[i]) / sum(exp(0.5 * ratio) for ratio in ratios[i:]))
        for ratios in lists
        for i in range(len(ratios) - 1)
    ]
    assert losses.tolist() == pytest.approx(expected)
    of_pairs = build_loss(LossConfig(use="sigmoid", beta=0.5))(policy, reference)
    assert losses[3].item() == pytest.approx(of_pairs[3].item()), "a list of two is a pair"


def test_lipo_weights_each_pair_of_a_list_by_the_gain_of_a_swap() -> None:
    lists, policy, reference = ranked_lists()
    losses = build_loss(LossConfig(use="lipo", beta=0.5))(policy, reference)
    expected = []
    for ratios in lists:
        gain = [2 ** (1 - i / (len(ratios) - 1)) for i in range(len(ratios))]
        discount = [1 / log(1 + sorted(ratios, reverse=True).index(ratio) + 1) for ratio in ratios]
        expected += [
            sum(
                abs(gain[i] - gain[j]) * abs(discount[i] - discount[j]) * softplus(-0.5 * (ratios[i] - ratios[j]))
                for j in range(i + 1, len(ratios))
            )
            for i in range(len(ratios) - 1)
        ]
    assert losses.tolist() == pytest.approx(expected)


def test_lipo_ranks_equal_scores_by_their_places() -> None:
    # All log-ratios are 0, as at the first step: ranks are 1, 2, 3, and each logistic loss is log 2.
    policy = replace(pairs([-1.0, -1.0], [-1.0, -1.0]), follows=torch.tensor([False, True]))
    losses = build_loss(LossConfig(use="lipo"))(policy, pairs([-1.0, -1.0], [-1.0, -1.0]))
    gain, discount = [2.0, 2**0.5, 1.0], [1 / log(2), 1 / log(3), 1 / log(4)]
    swaps = {(i, j): (gain[i] - gain[j]) * (discount[i] - discount[j]) for i in range(3) for j in range(i + 1, 3)}
    assert losses.tolist() == pytest.approx([(swaps[0, 1] + swaps[0, 2]) * log(2), swaps[1, 2] * log(2)])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"use": ["kto", "nll"]}, "kto is of completions without a pair and other losses of pairs; use it alone"),
        ({"use": "bco", "weighting": "wpo"}, "bco is of completions without a pair and loss.weighting: wpo of pairs"),
        ({"use": "lipo", "weighting": "wpo"}, "loss.weighting: wpo multiplies the loss of a pair"),
        ({"use": "bco", "weighting": "gap"}, "bco is of completions without a pair and loss.weighting: gap of pairs"),
        ({"use": "lipo", "weighting": "gap"}, "loss.weighting: gap multiplies the loss of a pair"),
        ({"use": "kto", "divergence": "js"}, "it applies to losses of the margin of log-ratios"),
    ],
)
def test_losses_of_labels_and_lists_are_rejected_beside_what_needs_pairs(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LossConfig.model_validate(loss)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("use", ["aot", "aot_unpaired"])
def test_ranked_losses_of_parts_add_up_to_the_sorted_ones_of_the_step(use: str, smoothing: float) -> None:
    draw = torch.Generator().manual_seed(0)
    policy, reference = (
        PairLogps(*torch.randn(2, 7, generator=draw, dtype=torch.float64), *torch.ones(2, 7)) for _ in range(2)
    )
    for logps in (policy.chosen, policy.rejected):
        logps.requires_grad_()
    ranked = replace(reference, of_step=rank_matches(policy, reference))
    loss = build_loss(LossConfig(use=use, beta=0.5, args={"label_smoothing": smoothing}))
    parts = torch.cat([loss(policy.of(part), ranked.of(part)) for part in (slice(0, 3), slice(3, 4), slice(4, 7))])

    if use == "aot":
        sides = policy.chosen - policy.rejected, reference.chosen - reference.rejected
    else:
        sides = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    margin = 0.5 * (sides[0].sort().values - sides[1].sort().values)
    whole = (1 - smoothing) * F.softplus(-margin) + smoothing * F.softplus(margin)
    assert parts.sum().item() == pytest.approx(whole.sum().item())
    of_parts, of_whole = (torch.autograd.grad(x.sum(), (policy.chosen, policy.rejected)) for x in (parts, whole))
    torch.testing.assert_close(of_parts, of_whole)


def pair(chosen: float, rejected: float) -> PairLogps:
    return PairLogps(torch.tensor([chosen]), torch.tensor([rejected]), torch.tensor([4]), torch.tensor([5]))


def test_hinge_is_one_minus_the_margin_and_never_negative() -> None:
    # log-ratios 1 and 0.5, margin 0.5 * 0.5 = 0.25
    loss = build_loss(LossConfig(use="hinge", beta=0.5))
    assert loss(pair(-10.0, -14.5), pair(-11.0, -15.0)).item() == pytest.approx(0.75)


def test_dpop_adds_its_penalty_where_chosen_falls_below_the_reference() -> None:
    # log-ratios -2 and -5: margin 3, penalty 10 * 2; 0.5 * (3 - 20) = -8.5
    loss = build_loss(LossConfig(use="dpop", beta=0.5, args={"penalty": 10.0}))
    assert loss(pair(-14.0, -20.0), pair(-12.0, -15.0)).item() == pytest.approx(softplus(8.5))


def test_ipo_is_zero_where_the_margin_per_token_is_half_of_one_over_beta() -> None:
    # log-ratios per token 12 / 4 = 3 and -10 / 5 = -2: margin 5 = 1 / (2 * 0.1)
    assert build_loss(LossConfig(use="ipo", beta=0.1))(pair(0.0, -25.0), pair(-12.0, -15.0)).item() == 0.0


@pytest.mark.parametrize("use", [use for use in LOSSES if use not in STEP_LOSSES])
def test_every_loss_has_the_gradient_of_its_values(use: str) -> None:
    loss = build_loss(LossConfig(use=use, beta=0.5))
    chosen, rejected = (torch.tensor([x], dtype=torch.float64) for x in (-12.0, -15.0))
    reference = PairLogps(chosen, rejected, *lengths())

    def value(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        unpaired = torch.tensor([1]) if use in UNPAIRED_LOSSES else None
        return loss(PairLogps(chosen, rejected, *lengths(), unpaired=unpaired), reference)

    at = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-12.5, -14.0)]
    assert torch.autograd.gradcheck(value, at)


def test_orpo_of_a_completion_that_is_certain_has_finite_gradients() -> None:
    certain = PairLogps(torch.zeros(1, requires_grad=True), torch.tensor([-20.0]), *lengths())
    build_loss(LossConfig(use="orpo"))(certain, None).sum().backward()
    assert gradient(certain.chosen).isfinite().all()


def lengths() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([4]), torch.tensor([5])


def test_losses_are_summed_with_their_weights_and_their_own_arguments() -> None:
    several = LossConfig(
        use=("sigmoid", "nll"), weights=(1.0, 0.2), beta=0.5, args={"sigmoid": {"label_smoothing": 0.1}}
    )
    expected = 0.9 * softplus(-3.5) + 0.1 * softplus(3.5) + 0.2 * 2.5
    assert build_loss(several)(pair(-10.0, -20.0), pair(-12.0, -15.0)).item() == pytest.approx(expected)


def test_a_pairs_weight_scales_its_loss() -> None:
    weighted = replace(pair(-10.0, -20.0), weights=torch.tensor([0.25]))
    loss = build_loss(LossConfig(beta=0.5, weighting="wpo"))
    assert loss(weighted, pair(-12.0, -15.0)).item() == pytest.approx(0.25 * softplus(-3.5))


def test_weights_of_mean_one_scale_the_gradient_of_each_pair_and_keep_the_mean_over_the_pairs() -> None:
    policy, reference = pairs([-10.0, -4.0], [-20.0, -1.0]), pairs([-12.0, -4.0], [-15.0, -2.0])
    weights = torch.tensor([0.5, 1.5])  # gaps of 1 and 3, whose mean is 2
    losses = build_loss(LossConfig(beta=0.5, weighting="gap"))(replace(policy, weights=weights), reference)
    assert losses.mean().item() == pytest.approx((0.5 * softplus(-3.5) + 1.5 * softplus(0.5)) / 2)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"args": {"smoothing": 0.1}}, "takes no argument 'smoothing'.*label_smoothing"),
        ({"use": "exo_pair", "args": {"label_smoothing": 0.0}}, r"exo_pair it must lie in \(0, 0.5\)"),
        ({"use": "tests.unit.objective.test_losses:mean_loss"}, r"returned \(\) for two pairs"),
        ({"use": "tests.unit.objective.test_losses:needs_more"}, "needs the argument 'alpha'"),
    ],
)
def test_an_invalid_loss_is_rejected_when_it_is_built(loss: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_loss(LossConfig.model_validate(loss))


def mean_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> torch.Tensor:
    return (policy.chosen - reference.chosen).mean()


def needs_more(policy: PairLogps, reference: PairLogps, *, alpha: float) -> torch.Tensor:
    return alpha * policy.chosen


def test_metrics_are_sums_over_the_pairs() -> None:
    policy, reference = pairs([-10.0, -4.0], [-20.0, -1.0]), pairs([-12.0, -4.0], [-15.0, -2.0])
    sums, terms = pair_metric_sums(torch.tensor([0.25, 0.75]), policy, reference, beta=0.5)
    assert terms.tolist() == [2] * 7
    assert dict(zip(PAIR_METRICS, sums.tolist(), strict=True)) == {
        "loss": 1.0,
        "rewards/chosen": 1.0,  # 0.5 * 2 and 0.5 * 0
        "rewards/rejected": -2.0,  # 0.5 * -5 and 0.5 * 1
        "rewards/margins": 3.0,  # 3.5 and -0.5
        "rewards/accuracies": 1.0,  # the first pair only
        "logps/chosen": -14.0,
        "logps/rejected": -21.0,
    }


def test_metrics_of_completions_without_a_pair_count_each_completion_once() -> None:
    # The second value of each is of a completion of another prompt.
    policy = replace(pairs([-10.0, -4.0], [-20.0, -1.0]), unpaired=torch.tensor([1, -1]))
    sums, terms = pair_metric_sums(torch.tensor([0.25, 0.75]), policy, pairs([-12.0, -4.0], [-15.0, -2.0]), beta=0.5)
    assert dict(zip(PAIR_METRICS, zip(sums.tolist(), terms.tolist(), strict=True), strict=True)) == {
        "loss": (1.0, 2),
        "rewards/chosen": (1.0, 1),  # 0.5 * 2
        "rewards/rejected": (0.5, 1),  # 0.5 * 1
        "rewards/margins": (0.5, 2),  # 1 - 0.5: the undesirable one got more likely
        "rewards/accuracies": (1.0, 2),
        "logps/chosen": (-10.0, 1),
        "logps/rejected": (-1.0, 1),
    }


def test_without_a_reference_rewards_are_log_probabilities_per_token() -> None:
    # 0.5 * -10 / 4 = -1.25 and 0.5 * -20 / 5 = -2
    sums, _ = pair_metric_sums(torch.tensor([1.0]), pair(-10.0, -20.0), None, beta=0.5)
    found = dict(zip(PAIR_METRICS, sums.tolist(), strict=True))
    assert (found["rewards/chosen"], found["rewards/rejected"], found["rewards/margins"]) == (-1.25, -2.0, 0.75)
    assert found["rewards/accuracies"] == 1.0


def test_results_of_pairs_have_loss_margin_and_log_ratios_whose_means_are_the_metrics() -> None:
    policy, reference = pairs([-10.0, -4.0], [-20.0, -1.0]), pairs([-12.0, -4.0], [-15.0, -2.0])
    losses = torch.tensor([0.25, 0.75])
    assert pair_results(losses, policy, reference, beta=0.5).tolist() == [
        [0.25, 3.5, 2.0, -5.0],
        [0.75, -0.5, 0.0, 1.0],
    ]
    labeled = pair_results(losses, replace(policy, unpaired=torch.tensor([1, -1])), reference, beta=0.5)
    assert labeled[:, 1].tolist() == [1.0, -0.5]
    assert labeled[:, 2:].isnan().tolist() == [[False, True], [True, False]], "without those of the other prompt"
    assert pair_results(losses, policy, None, beta=0.5)[:, 2:].isnan().all()
