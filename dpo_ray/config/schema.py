"""The configuration: a frozen tree of sections, each key with its default, bounds and meaning.

Defaults exist only here. ``--help`` prints the docstring under each key.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, model_validator
from pydantic_core import PydanticCustomError

from dpo_ray.plugins import validate_name
from dpo_ray.storage import folder_at, is_remote


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict) else value


def _folder_at(location: str, key: str) -> Path:
    try:
        return folder_at(location)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""One path or a list of paths."""


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
"""Kinds of training examples: pairs; pairs of neighbours in ranked lists; completions without a pair; or these, each
with a completion of another prompt."""
JUDGES = (
    "exact", "http", "implicit", "json_schema", "length", "llm", "math", "policy", "regex", "reward_model", "sentiment",
    "weighted",
)  # fmt: skip
IMPLICIT = "implicit"
"""The judge whose scores the training workers compute."""
SELECTORS = (
    "best_vs_worst", "best_vs_random", "random_pair", "all_pairs", "margin", "top_bottom_k", "length_controlled",
    "length_matched",
)  # fmt: skip
TRANSPORTS = ("object_store", "nccl", "ipc", "lora")
OPTIMIZERS = ("adamw", "adamw_8bit")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def _one_of(kind: str, names: tuple[str, ...]) -> Any:
    def validate(use: str | tuple[str, ...]) -> str | tuple[str, ...]:
        try:
            for name in (use,) if isinstance(use, str) else use:
                validate_name(name, names, kind)
        except ValueError as error:
            raise PydanticCustomError("unknown_component", "{problem}", {"problem": str(error)}) from None
        return use

    return AfterValidator(validate)


def _divergence(value: str | float) -> str | float:
    if value in DIVERGENCES or (isinstance(value, float) and 0 < value < 1):
        return value
    names = ", ".join(DIVERGENCES)
    raise PydanticCustomError("divergence", "input should be {names} or a number between 0 and 1", {"names": names})


def _refresh(value: Any) -> Any:
    if value in ("never", "round"):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return "round" if value == 1 else value
    raise PydanticCustomError("refresh", "input should be never, round or a number of rounds from 1")


class Component(Section):
    """A replaceable component."""

    use: str
    """Built-in name, or import path package.module:attribute."""
    args: dict[str, Any] = {}
    """Keyword arguments of the component."""


class RunConfig(Section):
    """Name, length, checkpoints and evaluations of the run."""

    dir: str = "runs"
    """Parent folder of run directories: a local path or a mount shared by all nodes. Offline runs also accept an object
    store, such as s3://bucket/runs (pip install 'dpo-ray[s3]'; credentials and endpoint from AWS_* variables)."""
    name: str = "dpo"
    """Name of the run directory. Rerun with the same name to resume."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Random seed of data order, sampling and initialization."""
    steps: int | None = Field(None, ge=1)
    """Number of optimizer steps; overrides run.epochs. Offline only: the length of an online run is online.rounds."""
    epochs: float = Field(1.0, gt=0)
    """Number of passes over the training pairs. Offline only."""
    save_every: int | None = Field(100, ge=1)
    """Steps between checkpoints offline, rounds between checkpoints online (default 1); null saves only when the run is
    interrupted."""
    eval_every: int | None = Field(50, ge=1)
    """Steps between evaluations offline, rounds between evaluations online (default 1); null evaluates only at the
    start and the end."""
    eval_at: tuple[NonNegativeInt, ...] = ()
    """Steps offline, rounds online, after which to evaluate, instead of every run.eval_every and at the start; the end
    is evaluated as well. Sweeps set it for their trials."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of most recent checkpoints to keep."""
    save_last: bool = True
    """Save a checkpoint at the end and when the run is interrupted; false saves only every run.save_every."""
    best_metric: str | None = None
    """Evaluation metric, such as eval/rewards/accuracies or heldout/score; the checkpoint with its best value is kept
    too. Online, training waits for the evaluation of each checkpoint."""
    best_mode: Literal["max", "min"] = "max"
    """max if larger values of run.best_metric are better, min if smaller ones are."""
    export: bool = True
    """Save the final policy in Hugging Face format, in policy/."""
    trackers: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), _one_of("tracker", TRACKERS)] = ()
    """Experiment trackers that receive every line of metrics.jsonl: tensorboard, wandb, mlflow, trackio (pip install
    'dpo-ray[wandb]', ...), or import paths. A tracker that fails does not fail the run."""
    tracker_args: dict[str, dict[str, Any]] = {}
    """A mapping from tracker name to its arguments: tensorboard {log_dir}, wandb those of wandb.init, mlflow
    {tracking_uri, experiment}, trackio those of trackio.init."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return folder_at(self.dir) / self.name

    @property
    def remote(self) -> bool:
        """True if the run directory is in an object store."""
        return is_remote(self.path)

    @model_validator(mode="after")
    def _validate_location(self) -> Self:
        _folder_at(self.dir, "run.dir")
        if not self.name or "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"run.name is {self.name!r}: it must be a plain folder name")
        return self

    @model_validator(mode="after")
    def _validate_trackers(self) -> Self:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"run.trackers: found {list(self.trackers)}; give each tracker once")
        if unknown := [name for name in self.tracker_args if name not in self.trackers]:
            accepted = ", ".join(self.trackers) or "nothing"
            raise ValueError(f"run.tracker_args.{unknown[0]}: run.trackers has {accepted}; add {unknown[0]!r} to it")
        if "tensorboard" in self.trackers and self.remote and "log_dir" not in self.tracker_args.get("tensorboard", {}):
            raise ValueError(
                f"run.trackers: tensorboard writes to a local folder, and run.dir is {self.dir!r}; set "
                "run.tracker_args.tensorboard.log_dir"
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685); the base model is frozen and kept in the compute dtype."""

    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(32, ge=1)
    """Scaling numerator: the adapter output is multiplied by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules to adapt: all-linear (all but the head), or a list of names such as [q_proj, v_proj]."""
    quantize: Literal["nf4"] | None = None
    """nf4 quantizes the frozen base weights to four bits (QLoRA, arXiv:2305.14314; needs bitsandbytes: pip install
    'dpo-ray[qlora]'). The reference uses the same quantized weights."""
    merge: bool = False
    """Also export policy/, the base model with the adapters merged, next to adapter/. Quantized weights are
    dequantized before merging."""


class ModelConfig(Section):
    """The policy."""

    path: str
    """Hub id or directory of a Hugging Face causal language model."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype. Master weights, gradient reduction and log-probabilities are always float32."""
    attention: Literal["auto", "flex", "sdpa", "padded"] = "auto"
    """Attention implementation. flex: flex_attention with a block mask, GPUs only. sdpa: scaled_dot_product_attention
    with a dense mask over the packed row; slow. padded: transformers' own attention, over a padded batch with one
    completion per row instead of a packed row, whatever optim.layout is. auto: padded for architectures that would mix
    the sequences of a packed row, such as those with recurrent layers; otherwise flex on GPUs and, on CPUs, torch's
    flash kernel for each pair."""
    fp8: bool = False
    """Run the matrix products of decoder layers in float8, on GPUs that support it (needs torchao: pip install
    'dpo-ray[low_bit]'). Weights are stored and gathered as usual. Faster for large models with shard.compile."""
    cpu_products: Literal["auto", "bfloat16", "rounded", "float32"] = "auto"
    """Matrix products of dtype: bfloat16 on CPUs. bfloat16: as they are. rounded: as float32 that the CPU may round to
    bfloat16. float32: as float32. auto: the fastest for each class of products, measured in 0.3 s on the slowest worker
    and cached in reference.cache_dir. Logits are float32 in any case."""
    chat_template: str | None = None
    """Path of a Jinja chat template to use instead of the tokenizer's own; required for models without one."""
    lora: LoraConfig | None = None
    """LoRA settings; null trains all weights."""

    @model_validator(mode="after")
    def _validate_fp8(self) -> Self:
        if self.fp8 and self.lora is not None:
            raise ValueError("model.fp8 is for training all weights; leave out model.fp8 or model.lora")
        if self.fp8 and self.dtype == "float32":
            raise ValueError("model.fp8 is less precise than model.dtype: float32; set model.dtype: bfloat16")
        return self


class ReferenceConfig(Section):
    """The reference model."""

    kind: Literal["auto", "cached", "live", "adapters_off", "none"] = "auto"
    """Source of reference log-probabilities. cached: computed once with the untrained policy and stored. live: a frozen
    sharded copy of the model. adapters_off: the policy with its adapters disabled. none: no reference, for
    reference-free losses. auto: none for these losses; cached offline and with refresh: round; otherwise adapters_off
    with model.lora and live without. With any other refresh, auto with model.lora keeps a copy of the adapters."""
    refresh: Annotated[str | int, BeforeValidator(_refresh)] = "never"
    """Rounds between two refreshes of the reference from the policy: round uses the policy at the start of each round
    as the reference of that round; a number K does so every K rounds, with a copy kept in between. Online only."""
    mixup_alpha: float = Field(1.0, gt=0, le=1)
    """Share of the policy's weights in a refresh: reference = alpha * policy + (1 - alpha) * reference (TR-DPO,
    arXiv:2404.09656). 1 replaces the reference; less keeps a float32 copy of the trained weights."""
    cache_dir: str | None = None
    """Directory of cached reference log-probabilities and tokenized data, shared by all runs; null is
    ~/.cache/dpo_ray."""
    object_store: str | None = None
    """Folder in an object store, such as s3://bucket/reference, through which clusters without a common
    reference.cache_dir share cached log-probabilities."""

    @model_validator(mode="after")
    def _validate_folders(self) -> Self:
        if self.cache_dir and "://" in self.cache_dir:
            raise ValueError(
                f"reference.cache_dir is {self.cache_dir!r}: the cache is memory-mapped; give a local path or a mount, "
                "and reference.object_store to share its log-probabilities through an object store"
            )
        if self.object_store is not None and not is_remote(_folder_at(self.object_store, "reference.object_store")):
            raise ValueError(
                f"reference.object_store is {self.object_store!r}: give s3://bucket/path, or set reference.cache_dir "
                "to a path"
            )
        return self

    @property
    def refresh_every(self) -> int | None:
        """Rounds between two refreshes; None without refreshes."""
        return {"never": None, "round": 1}[self.refresh] if isinstance(self.refresh, str) else self.refresh

    @property
    def refreshes_copy(self) -> bool:
        """True if refreshes change a copy; the reference is then neither untrained nor the policy of the round."""
        return self.refresh_every is not None and (self.refresh_every > 1 or self.mixup_alpha < 1)

    @property
    def cache_path(self) -> Path:
        """The cache directory."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else Path.home() / ".cache" / "dpo_ray"


class DataConfig(Section):
    """Preference pairs."""

    train: Paths = ()
    """Training pairs: files (JSON, JSONL, CSV, Parquet, Arrow), folders of files, patterns such as data/*.jsonl, or hub
    datasets (name or name:split)."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Passes over each entry of data.train per epoch, such as [1, 0.25, 3]; over several epochs all pairs of an entry
    are seen equally often. Empty is one pass over each."""
    eval: Paths = ()
    """Held-out pairs; empty disables offline evaluation."""
    max_prompt_tokens: int | None = Field(1024, ge=1)
    """Maximum prompt length in tokens; records with longer prompts are dropped. null is no limit."""
    max_completion_tokens: int | None = Field(1024, ge=1)
    """Maximum completion length in tokens; longer completions are truncated at the end. null is no limit."""
    strings: Literal["auto", "raw", "chat"] = "auto"
    """Use of prompts and completions that are strings: chat puts them into the chat template, raw uses them as written.
    auto is chat for a model with a chat template, except for records that contain special tokens."""
    pairs_per_prompt: int = Field(1, ge=1)
    """Maximum number of pairs of a ranked list, by decreasing difference of scores: best against worst first. The
    losses of ranked lists take whole lists."""
    limit: int | None = Field(None, ge=1)
    """Use only the first records of data.train, up to this number."""
    shuffle: bool = True
    """Shuffle the training pairs in each epoch."""
    strict: bool = False
    """Fail if any record is dropped."""

    @model_validator(mode="after")
    def _validate_weights(self) -> Self:
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError(f"data.weights has {len(self.weights)} entries for {len(self.train)} in data.train")
        return self


class LossConfig(Section):
    """The preference loss."""

    use: Annotated[str | tuple[str, ...], _one_of("loss", LOSSES)] = "sigmoid"
    """Loss name or import path, or a list of losses to sum: sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair,
    nca_pair, sppo_hard, apo_zero, apo_down, discopop, dpop, bco_pair, aot, aot_unpaired; kto and bco of records with
    one completion and a label (a pair counts as two of them); plackett_luce and lipo of ranked lists; and
    reference-free simpo, orpo, nll."""
    weights: tuple[float, ...] = ()
    """Weight of each loss in loss.use; empty is 1 for each."""
    weighting: Literal["none", "wpo", "gap"] = "none"
    """Weight of each pair. wpo: likelihood of both completions under the policy (arXiv:2406.11827). gap, online only:
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
    args: dict[str, Any] = {}
    """Further keyword arguments of the loss; with several losses, a mapping from loss name to its arguments."""

    @property
    def names(self) -> tuple[str, ...]:
        """The losses to sum."""
        return (self.use,) if isinstance(self.use, str) else self.use

    @property
    def reference_free(self) -> bool:
        """True if no loss in use takes a reference."""
        return all(name in REFERENCE_FREE_LOSSES for name in self.names)

    @property
    def needing_reference(self) -> list[str]:
        """The built-in losses in use that take a reference."""
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


class OptimConfig(Section):
    """Optimizer, learning rate schedule and batch size."""

    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate schedule after warmup."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warmup from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, applied to weight matrices but not to norms and biases."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW coefficients of the running averages of the gradient and its square."""
    eps: float = Field(1e-8, gt=0)
    """AdamW term added to the denominator for numerical stability."""
    use: Annotated[str, _one_of("optimizer", OPTIMIZERS)] = "adamw"
    """adamw, or adamw_8bit with a quarter of the optimizer state memory (needs torchao: pip install
    'dpo-ray[low_bit]'; resumes only on the same number of workers), or an import path. An imported optimizer is called
    with parameter groups, and with those of lr, betas and eps that it accepts."""
    args: dict[str, Any] = {}
    """Further keyword arguments of the optimizer."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Maximum global gradient norm; larger gradients are clipped."""
    max_skipped_steps: int = Field(3, ge=0)
    """Consecutive steps that may be skipped because of a non-finite loss or gradient before the run fails."""
    pairs_per_step: int = Field(32, ge=1)
    """Global batch size: pairs per optimizer step over all workers."""
    tokens_per_micro_batch: int = Field(4096, ge=1)
    """Maximum tokens per micro-batch of one worker, with padding if there is any; a longer pair forms a micro-batch of
    its own. With shard.context_parallel the limit is multiplied by the number of workers that share a row."""
    layout: Literal["shared", "plain"] = "shared"
    """shared computes the prompt once per pair. plain computes it once per completion; slower, for comparison.
    Without effect where batches are padded; see model.attention."""


def _checkpointing_mode(value: Any) -> Any:
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class ShardConfig(Section):
    """Parallelism and memory of training. replicate * context_parallel * tensor_parallel must divide the workers."""

    replicate: int = Field(1, ge=1)
    """Number of replicas of the sharded model (HSDP); must divide cluster.train_workers."""
    context_parallel: int = Field(1, ge=1)
    """Number of adjacent workers that split the tokens of each row, to spread the activations of long pairs."""
    tensor_parallel: int = Field(1, ge=1)
    """Number of adjacent workers that split each layer's matrices and the vocabulary; must divide the model's attention
    heads and key-value heads. replicate * context_parallel * tensor_parallel must divide cluster.train_workers. Not
    supported with model.lora, model.fp8, optim.use: adamw_8bit, shard.compile or shard.activation_offload."""
    reshard_after_forward: bool = True
    """Free the gathered weights of a layer after its forward pass; false keeps them until the end of the step, which is
    faster and takes more memory. A single worker on a CPU always keeps them."""
    prefetch: int = Field(1, ge=1)
    """Number of layers whose weights are gathered ahead of use; each takes the memory of one unsharded layer."""
    activation_checkpointing: Annotated[Literal["none", "full", "selective"], BeforeValidator(_checkpointing_mode)] = (
        "none"
    )
    """Activations to recompute in the backward pass. selective: all but matrix products and attention, at little cost;
    not supported with shard.compile. full: everything, for the least memory and about a third more time."""
    activation_offload: bool = False
    """Offload saved activations to host memory; GPUs only. With selective checkpointing, only layer inputs are
    offloaded."""
    cpu_offload: bool = False
    """Offload parameter shards and optimizer state to host memory; GPUs only."""
    compile: bool = False
    """Compile each decoder layer with torch.compile."""


class ClusterConfig(Section):
    """Resources of the run. GPUs are used if the cluster has any."""

    train_workers: int = Field(1, ge=1)
    """Number of training workers, with one GPU each if the cluster has GPUs."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPUs per training worker; also its number of torch threads on a CPU cluster."""
    rollout_engines: int = Field(1, ge=1)
    """Number of vLLM engines. Online only."""
    gpus_per_engine: int = Field(1, ge=1)
    """Tensor parallel size of an engine; ignored on a cluster without GPUs."""
    cpus_per_engine: int = Field(1, ge=1)
    """CPUs per engine; also its number of threads on a CPU cluster."""
    colocate: bool = False
    """Run engines on the GPUs of training workers: training and generation alternate, and engines sleep during training
    with their weights in host memory. Requires online.max_lag: 0, and an online.engine.gpu_memory_utilization that
    leaves room for the training state (or shard.cpu_offload). On CPUs, training and generation only alternate."""
    max_restarts: int = Field(3, ge=0)
    """Times that failed training workers are restarted from the last checkpoint before the run fails."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Seconds to wait for workers and engines to start."""
    stop_timeout_s: float = Field(120.0, gt=0)
    """Seconds to wait for the final checkpoint after Ctrl-C or SIGTERM."""


class SamplingConfig(Section):
    """Sampling parameters of candidates."""

    temperature: float = Field(1.0, ge=0)
    """Sampling temperature. Must be above 0, because greedy candidates would be identical."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Cumulative probability of the tokens to sample from; 1 considers all tokens."""
    top_k: int = Field(0, ge=0)
    """Number of most likely tokens to sample from; 0 considers all tokens."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Minimum probability of a token, relative to that of the most likely one; 0 considers all tokens."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Penalty for tokens of the prompt and of the completion so far: above 1 discourages them, below 1 favors them."""
    max_tokens: int = Field(256, ge=1)
    """Maximum number of tokens to generate per completion."""
    min_tokens: int = Field(0, ge=0)
    """Number of tokens to generate before an end-of-turn token or one of stop_token_ids may be sampled."""
    stop: tuple[str, ...] = ()
    """Strings that stop generation, in addition to the model's end-of-turn token."""
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    """Token ids that stop generation, in addition to the model's end-of-turn token."""

    @model_validator(mode="after")
    def _validate_min_tokens(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"online.sampling.min_tokens is {self.min_tokens}; it must be at most online.sampling.max_tokens, "
                f"{self.max_tokens}"
            )
        return self


class EngineConfig(Section):
    """vLLM engine arguments."""

    max_model_len: int | None = Field(None, ge=1)
    """Maximum tokens of prompt and completion; null is data.max_prompt_tokens + online.sampling.max_tokens, and with
    online.judge.use: policy, whose prompts contain completions, another online.sampling.max_tokens + 1024."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Size of the key-value cache of a CPU engine in GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Fraction of GPU memory that vLLM may use."""
    enforce_eager: bool | None = None
    """Disable compilation and CUDA graphs: faster start, slower generation on GPUs. null disables them on CPUs only."""
    args: dict[str, Any] = {}
    """Further keyword arguments of vllm.LLM."""


class JudgeConfig(Component):
    """The judge, which scores completions."""

    use: Annotated[str, _one_of("judge", JUDGES)] = "length"
    """Judge, or an import path. reward_model: a Hugging Face sequence classifier in the judge's process. http: a reward
    server of OpenRLHF, vLLM or SGLang. llm: a language model behind an OpenAI-compatible endpoint. policy: the policy
    itself, by the run's engines. implicit: the log-ratio of policy and reference. exact, regex, json_schema, math:
    compare with a field of the record. weighted: a sum of several. length, sentiment: for tests and demos."""
    replicas: int = Field(1, ge=1)
    """Number of judge processes."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs of each judge process, also a fraction; a judge without one sees none."""
    batch: int = Field(16, ge=1)
    """Maximum number of prompts per call of the judge; a call takes those that wait."""
    concurrency: int | None = Field(None, ge=1)
    """Calls in progress per replica; null is what the judge asks for, else 32 for one that is an async function, and 1
    for others, which need not be thread-safe."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds to wait for one call; then the judge's process is restarted."""

    def asks(self, name: str) -> bool:
        """True if the judge, or a part of a weighted one, is the built-in judge ``name``."""
        parts = self.args.get("judges") if self.use == "weighted" else None
        uses = [part.get("use") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        return name in (self.use, *uses)

    retries: int = Field(1, ge=0)
    """Further attempts for a prompt whose completions the judge failed to score."""


class SelectConfig(Component):
    """The selector, which picks the pairs of chosen and rejected completions of a prompt."""

    use: Annotated[str, _one_of("selector", SELECTORS)] = "best_vs_worst"
    """Selector: best_vs_worst, best_vs_random, random_pair, all_pairs, margin (gap of scores in a range), top_bottom_k
    (the k best matched with the k worst), length_controlled (penalty per token, range of length ratios),
    length_matched (closest lengths), or an import path."""


class SourceConfig(Section):
    """The sources of a round's pairs."""

    use: Literal["candidates", "self_play"] = "candidates"
    """candidates: judge and selector pick pairs from the policy's completions. self_play: the answer of the prompt's
    record is chosen and the policy's completions are rejected (SPIN, arXiv:2401.01335)."""
    mix: float = Field(0.0, ge=0, lt=1)
    """Fraction of a full round's pairs that comes from data.train."""
    replay: float = Field(0.0, ge=0, lt=1)
    """Fraction of a full round's pairs that is drawn from earlier rounds."""
    replay_rounds: int = Field(4, ge=1)
    """Number of past rounds to draw them from."""

    def pairs_of(self, share: float, new_pairs: int) -> int:
        """Number of pairs that are ``share`` of a round in which ``new_pairs`` come from ``use``."""
        return round(share * new_pairs / (1 - self.mix - self.replay))

    @model_validator(mode="after")
    def _validate_fractions(self) -> Self:
        if self.mix + self.replay >= 1:
            raise ValueError(
                f"online.source.mix ({self.mix:g}) and online.source.replay ({self.replay:g}) leave nothing for new "
                "pairs; their sum must be below 1"
            )
        return self


class SyncConfig(Component):
    """The transport of weights from trainer to engines."""

    use: Annotated[str, _one_of("transport", ("auto", *TRANSPORTS))] = "auto"
    """Weight transport. object_store: Ray's object store, for CPUs and GPUs. nccl: NCCL broadcast, for engines with
    GPUs of their own. ipc: CUDA IPC on the same GPU, with cluster.colocate. lora: the adapters of model.lora alone,
    which engines merge into the weights of model.path. auto: object_store without GPUs, otherwise nccl or ipc. Or an
    import path."""


class OnlineConfig(Section):
    """Rounds of generate, judge, select, train."""

    prompts: Paths
    """Training prompts: files or hub datasets with a prompt (or messages) field."""
    eval_prompts: Paths = ()
    """Held-out prompts; the judge scores their completions before, during and after the run."""
    rounds: int = Field(10, ge=1)
    """Number of rounds."""
    prompts_per_round: int = Field(256, ge=1)
    """Prompts to generate candidates for per round."""
    epochs_per_round: int = Field(1, ge=1)
    """Passes over the pairs of a round."""
    source: SourceConfig = SourceConfig()
    candidates: int = Field(4, ge=1)
    """Completions to sample per prompt; at least 2, and 1 or more with online.source.use: self_play."""
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    max_lag: int = Field(0, ge=0)
    """Rounds that generation may run ahead of training; 0 is on-policy."""
    judge: JudgeConfig = JudgeConfig()
    eval_judge: JudgeConfig | None = None
    """Judge of the held-out completions; null is online.judge."""
    select: SelectConfig = SelectConfig()
    sync: SyncConfig = SyncConfig()
    kl_samples: int = Field(32, ge=1)
    """Completions per evaluation used to estimate the KL divergence of the policy from the reference, sampled at
    temperature 1 from all tokens. The held-out completions serve if they are sampled so."""
    max_failed_share: float = Field(0.1, ge=0, le=1)
    """Fraction of a round's prompts that may fail (the judge raises, a request times out, engines die over it) before
    the run fails. Failed prompts make no pair and are counted by reason."""
    keep_rounds: int | None = Field(None, ge=0)
    """Number of past rounds whose texts and token ids are kept; null keeps all. Manifests are always kept."""
    generate_timeout_s: float = Field(1800.0, gt=0)
    """Seconds to wait for the candidates of a prompt."""
    engine_timeout_s: float = Field(120.0, gt=0)
    """Seconds without an answer, or within one step, after which an engine counts as hung and is replaced."""
    sync_timeout_s: float = Field(600.0, gt=0)
    """Seconds to wait for a weight update of the engines."""
    probe_tolerance: float = Field(0.1, gt=0)
    """Maximum mean absolute difference, in nats per token, between trainer and engine log-probabilities of a probe text
    after a weight update. Two bfloat16 implementations of the same weights differ by 0.03 to 0.06."""

    @property
    def judged_by_trainer(self) -> bool:
        """True if the training workers score the completions."""
        return self.judge.use == IMPLICIT and self.source.use == "candidates"

    @property
    def judges(self) -> dict[str, JudgeConfig]:
        """The judges that the run needs, by key: ``judge`` for its rounds, ``eval_judge`` for held-out completions."""
        in_rounds = self.source.use == "candidates" and not self.judged_by_trainer
        judges = {"judge": self.judge} if in_rounds else {}
        return judges | ({"eval_judge": self.eval_judge or self.judge} if self.eval_prompts else {})

    @model_validator(mode="after")
    def _validate_judges(self) -> Self:
        evaluated = self.eval_judge or self.judge
        if self.eval_prompts and evaluated.use == IMPLICIT:
            raise ValueError(
                "online.judge.use: implicit compares policy and reference, which says nothing of held-out completions; "
                "set online.eval_judge, or leave out online.eval_prompts"
            )
        return self

    @model_validator(mode="after")
    def _validate_temperature(self) -> Self:
        if self.source.use == "self_play":
            return self
        if self.candidates < 2:
            raise ValueError(
                f"online.candidates is {self.candidates}: a pair is made of two completions; set it to 2 or more, or "
                "online.source.use: self_play"
            )
        if self.sampling.temperature == 0:
            raise ValueError(
                f"online.sampling.temperature is 0: all {self.candidates} candidates (online.candidates) would be the "
                "same text, and equal ones make no pair; set it above 0"
            )
        return self
