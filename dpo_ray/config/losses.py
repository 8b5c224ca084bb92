"""The section ``loss``."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from dpo_ray.config.section import Section, one_of

# The names of built-in components are repeated here, so that a wrong name is rejected before torch is imported. A test
# compares them with the registries.
LOSSES = (
    "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "dpop", "bco_pair", "aot", "aot_unpaired", "kto", "bco",
    "plackett_luce", "lipo", "simpo", "orpo", "nll",
)  # fmt: skip
REFERENCE_FREE_LOSSES = ("simpo", "orpo", "nll")
MARGIN_LOSSES = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop")
"""Losses of the margin of log-ratios only, which loss.divergence generalizes."""
DIVERGENCES = ("reverse_kl", "forward_kl", "js")
STEP_LOSSES = ("aot", "aot_unpaired", "kto")
"""Losses whose value for a pair depends on all pairs of its step."""
UNPAIRED_LOSSES = ("kto", "bco")
"""Losses of completions without a pair."""
LIST_LOSSES = ("plackett_luce", "lipo")
"""Losses of ranked lists."""
Examples = Literal["pairs", "lists", "unpaired", "unpaired_kl"]
"""Kinds of training examples: pairs; pairs of neighbors in ranked lists; completions without a pair; or these, each
with a completion of another prompt."""


def _divergence(value: str | float) -> str | float:
    if value in DIVERGENCES or (isinstance(value, float) and 0 < value < 1):
        return value
    names = ", ".join(DIVERGENCES)
    raise PydanticCustomError("divergence", "input should be {names} or a number between 0 and 1", {"names": names})


class LossConfig(Section):
    """The preference loss."""

    use: Annotated[str | tuple[str, ...], one_of("loss", LOSSES)] = "sigmoid"
    """Loss name or import path, or a list of losses to sum: sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair,
    nca_pair, sppo_hard, apo_zero, apo_down, discopop, dpop, bco_pair, aot, aot_unpaired; kto and bco of records with
    one completion and a label (a pair counts as two of them); plackett_luce and lipo of ranked lists; and
    reference-free simpo, orpo, nll."""
    weights: tuple[float, ...] = ()
    """Weight of each loss in loss.use; empty is 1 for each."""
    weighting: Literal["none", "wpo", "gap"] = "none"
    """Weight of each pair. wpo: likelihood of both completions under the policy (arXiv:2406.11827). gap:
    difference of the scores of chosen and rejected, divided by its mean over the pairs of the step."""
    divergence: Annotated[str | float, AfterValidator(_divergence)] = "reverse_kl"
    """Divergence from the reference that the policy is regularized with (f-DPO, arXiv:2309.16240): reverse_kl, which is
    DPO, forward_kl, js, or a number between 0 and 1: the alpha-divergence between reverse_kl (0) and forward_kl (1).
    For sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair and discopop."""
    beta: float = Field(0.1, gt=0)
    """Strength of the penalty for diverging from the reference. Typical values are 0.01 to 0.5, or 2 to 10 for losses
    on log-probabilities per token."""
    router_aux: float = Field(0.0, ge=0)
    """Weight of the experts' load balancing loss in a mixture of experts (arXiv:2101.03961); pretraining uses about
    0.001. It is computed per sequence, so it does not depend on micro-batches."""
    args: dict[str, Any] = Field({})
    """Further keyword arguments of the loss; with several losses, a mapping from loss name to its arguments."""

    @property
    def names(self) -> tuple[str, ...]:
        """The losses to sum."""
        return (self.use,) if isinstance(self.use, str) else self.use

    @property
    def reference_free(self) -> bool:
        """True if no loss in use needs reference log-probabilities."""
        return all(name in REFERENCE_FREE_LOSSES for name in self.names)

    @property
    def reference_losses(self) -> list[str]:
        """Names of the built-in losses in use that need reference log-probabilities."""
        return [name for name in self.names if name in LOSSES and name not in REFERENCE_FREE_LOSSES]

    @property
    def of_step(self) -> str | None:
        """The loss in use, if any, whose value for a pair depends on all pairs of its step."""
        return next((name for name in self.names if name in STEP_LOSSES), None)

    @property
    def examples(self) -> Examples:
        """Kind of training examples that the loss takes."""
        if "kto" in self.names:
            return "unpaired_kl"
        if "bco" in self.names:
            return "unpaired"
        return "lists" if any(name in LIST_LOSSES for name in self.names) else "pairs"

    @model_validator(mode="after")
    def _validate_combination(self) -> Self:
        if self.divergence != "reverse_kl":
            accepted = (*MARGIN_LOSSES, "nll")
            if unsupported := [name for name in self.names if name not in accepted]:
                raise ValueError(
                    f"loss.divergence is {self.divergence!r}: it applies to losses of the margin of log-ratios, and "
                    f"loss.use has {unsupported[0]!r}; use {', '.join(MARGIN_LOSSES)}, or set loss.divergence: "
                    "reverse_kl"
                )
        if self.weighting != "none" and self.of_step in ("aot", "aot_unpaired"):
            raise ValueError(
                f"loss.weighting: {self.weighting} multiplies the loss of a pair, and each term of aot and "
                "aot_unpaired belongs to two pairs; set loss.weighting: none"
            )
        if self.weighting != "none" and self.examples == "lists":
            raise ValueError(
                f"loss.weighting: {self.weighting} multiplies the loss of a pair, and plackett_luce and lipo are of "
                "lists; set loss.weighting: none"
            )
        unpaired = [name for name in self.names if name in UNPAIRED_LOSSES]
        if unpaired and (len(self.names) > 1 or self.weighting != "none"):
            other = f"loss.weighting: {self.weighting}" if len(self.names) == 1 else "other losses"
            raise ValueError(
                f"loss.use: {unpaired[0]} is of completions without a pair and {other} of pairs; use it alone"
            )
        return self

    @model_validator(mode="after")
    def _validate_terms(self) -> Self:
        names = self.names
        if not names or len(set(names)) < len(names):
            raise ValueError(f"loss.use: found {list(names)}; give at least one loss, and each once")
        if self.weights and len(self.weights) != len(names):
            raise ValueError(f"loss.weights has {len(self.weights)} entries for {len(names)} losses in loss.use")
        if len(names) > 1 and (unknown := [key for key in self.args if key not in names]):
            raise ValueError(
                f"loss.args.{unknown[0]}: with several losses, loss.args maps a loss's name to its arguments; "
                f"loss.use has {', '.join(names)}"
            )
        if len(names) > 1 and (flat := [key for key, args in self.args.items() if not isinstance(args, dict)]):
            raise ValueError(f"loss.args.{flat[0]}: found {self.args[flat[0]]!r}; it takes a mapping of arguments")
        return self
