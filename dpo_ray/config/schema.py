"""The configuration: a frozen tree of sections, each key with its default, bounds and meaning.

Defaults exist only here and in the modules of single sections. ``--help`` prints the docstring under each key.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, model_validator
from pydantic_core import PydanticCustomError

from dpo_ray.config.section import Paths, Section, as_tuple, folder_of, one_of
from dpo_ray.storage import folder_at, is_remote

OPTIMIZERS = ("adamw", "adamw_8bit")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def _refresh(value: Any) -> Any:
    if value in ("never", "round"):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return "round" if value == 1 else value
    raise PydanticCustomError("refresh", "input should be never, round or a number of rounds from 1")


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
    """Steps offline, rounds online, after which to evaluate, instead of every run.eval_every, at the start and at
    checkpoints; the end is evaluated as well. Sweeps set it for their trials."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of most recent checkpoints to keep."""
    save_last: bool = True
    """Save a checkpoint at the end and when the run is interrupted. false saves only every run.save_every, and offline
    not where the run is interrupted; sweeps set it for trials that nothing continues."""
    best_metric: str | None = None
    """Evaluation metric, such as eval/rewards/accuracies or heldout/score; the checkpoint with its best value is kept
    too. Online, training waits for the evaluation of each checkpoint."""
    best_mode: Literal["max", "min"] = "max"
    """max if larger values of run.best_metric are better, min if smaller ones are."""
    export: bool = True
    """Save the final policy in Hugging Face format, in policy/."""
    trackers: Annotated[tuple[str, ...], BeforeValidator(as_tuple), one_of("tracker", TRACKERS)] = ()
    """Experiment trackers that receive every line of metrics.jsonl: tensorboard, wandb, mlflow, trackio (pip install
    'dpo-ray[wandb]', ...), or import paths. A tracker that fails does not fail the run."""
    tracker_args: dict[str, dict[str, Any]] = Field({})
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
        folder_of(self.dir, "run.dir")
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
    and cached in reference.cache_dir. Products accumulate in float32 in any case."""
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
    as the reference of that round; a number K does so every K rounds, with a copy kept in between. Online only; with
    online.source.use: self_play the default is round, unless reference.kind or the loss excludes refreshes."""
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
        if self.object_store is not None and not is_remote(folder_of(self.object_store, "reference.object_store")):
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
    use: Annotated[str, one_of("optimizer", OPTIMIZERS)] = "adamw"
    """adamw, or adamw_8bit with a quarter of the optimizer state memory (needs torchao: pip install
    'dpo-ray[low_bit]'; resumes only on the same number of workers), or an import path. An imported optimizer is called
    with parameter groups, and with those of lr, betas and eps that it accepts."""
    args: dict[str, Any] = Field({})
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
    worker_timeout_s: float = Field(300.0, gt=0)
    """Seconds after which a training worker that does not answer counts as dead: all of them restart from the last
    checkpoint. Workers answer while they compute and communicate; a process that is stopped or a node that hangs does
    not. RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S, where it is set, counts instead."""
    stop_timeout_s: float = Field(120.0, gt=0)
    """Seconds to wait for the final checkpoint after Ctrl-C or SIGTERM."""
