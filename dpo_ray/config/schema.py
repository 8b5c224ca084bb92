"""The configuration: one frozen tree of sections, each field with its default, bounds and meaning.

Defaults exist only here. The text under a field is its documentation: ``--help`` prints it.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dpo_ray.config.cross_checks import validate_sections
from dpo_ray.plugins import validate_name
from dpo_ray.storage import folder_at, is_remote


class Section(BaseModel):
    """A part of the tree: immutable, and closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""One path or a list of paths."""


LOSSES = (
    "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "dpop", "simpo", "orpo", "nll",
)  # fmt: skip
REFERENCE_FREE_LOSSES = ("simpo", "orpo", "nll")
JUDGES = ("length", "sentiment")
SELECTORS = ("best_vs_worst", "random_pair")
TRANSPORTS = ("object_store", "nccl", "ipc")
OPTIMIZERS = ("adamw", "adamw_8bit")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
# Names of built-in parts stand here besides in the parts' own dictionaries (a test holds them equal), so that a wrong
# one is refused before torch is imported.


def _one_of(kind: str, names: tuple[str, ...]) -> Any:
    def known(use: str | tuple[str, ...]) -> str | tuple[str, ...]:
        try:
            for name in (use,) if isinstance(use, str) else use:
                validate_name(name, names, kind)
        except ValueError as error:
            raise PydanticCustomError("unknown_component", "{problem}", {"problem": str(error)}) from None
        return use

    return AfterValidator(known)


class Component(Section):
    """A replaceable part."""

    use: str
    """Built-in name, or import path package.module:attribute."""
    args: dict[str, Any] = {}
    """Keyword arguments the part is built with."""


class RunConfig(Section):
    """What the run is called, how long it lasts, what it keeps."""

    dir: str = "runs"
    """Folder that holds run directories: a local path or a mount shared by all nodes; for offline runs also an object
    store, such as s3://bucket/runs (pip install 'dpo-ray[s3]'; credentials and endpoint from the environment, AWS_*).
    """
    name: str = "dpo"
    """Name of this run; the same name resumes it."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the data order, the sampling and everything else drawn at random."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; overrides epochs. Offline only: an online run lasts online.rounds."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training pairs."""
    save_every: int | None = Field(100, ge=1)
    """Steps between checkpoints offline, rounds online (there 1 unless set); null saves only when the run is asked to
    stop."""
    eval_every: int | None = Field(50, ge=1)
    """Steps between evaluations offline, rounds online (there 1 unless set); null evaluates at the start and the end
    only."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    best_metric: str | None = None
    """A metric of evaluations, such as eval/rewards/accuracies; the checkpoint where it was best stays as well."""
    best_mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller run.best_metric is better."""
    export: bool = True
    """Write the final policy as a Hugging Face directory, policy/."""
    trackers: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), _one_of("tracker", TRACKERS)] = ()
    """Experiment trackers that get every line of metrics.jsonl: tensorboard, wandb, mlflow, trackio (pip install
    'dpo-ray[wandb]', ...), or import paths. A tracker that fails does not fail the run."""
    tracker_args: dict[str, dict[str, Any]] = {}
    """A mapping from a tracker's name to its arguments: tensorboard {log_dir}, wandb those of wandb.init, mlflow
    {tracking_uri, experiment}, trackio those of trackio.init."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return folder_at(self.dir) / self.name

    @property
    def remote(self) -> bool:
        """Whether the run directory is in an object store."""
        return is_remote(self.path)

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            folder_at(self.dir)
        except ValueError as error:
            raise ValueError(f"run.dir: {error}") from None
        if not self.name or "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"run.name is {self.name!r}: it must be a plain folder name")
        return self

    @model_validator(mode="after")
    def _trackers_agree(self) -> Self:
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
    """Low-rank adapters (arXiv:2106.09685): the model itself is frozen and kept in the compute dtype."""

    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(32, ge=1)
    """Adapters are scaled by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules that get adapters: all-linear (all but the head), or names such as [q_proj, v_proj]."""
    quantize: Literal["nf4"] | None = None
    """nf4: hold the frozen weights that adapters are added to in four bits (QLoRA, arXiv:2305.14314; needs
    bitsandbytes). The reference has the same four bits."""
    merge: bool = False
    """Also export policy/, the model with the adapters added in, beside adapter/; of quantized weights what four bits
    have."""


class ModelConfig(Section):
    """The policy."""

    path: str
    """Hub id or directory of a Hugging Face causal language model."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype. Master weights, gradient reduction and log-probabilities are float32 always."""
    attention: Literal["auto", "flex", "sdpa"] = "auto"
    """flex: flex_attention with a block mask over a packed row, on GPUs only. sdpa: the same by a mask over the whole
    row; slow. auto: flex on GPUs, on CPUs torch's flash kernel on each pair of the row."""
    fp8: bool = False
    """Multiply in the decoder layers in eight-bit floating point, on GPUs that can (needs torchao: pip install
    'dpo-ray[low_bit]'); weights are kept and gathered as without it. Saves time in large models, with shard.compile."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's own; needed for models without one."""
    lora: LoraConfig | None = None
    """Absent: all weights are trained."""

    @model_validator(mode="after")
    def _fp8_fits(self) -> Self:
        if self.fp8 and self.lora is not None:
            raise ValueError("model.fp8 is for training all weights; leave out model.fp8 or model.lora")
        if self.fp8 and self.dtype == "float32":
            raise ValueError("model.fp8 computes with less than model.dtype: float32 asks for; set bfloat16")
        return self


class ReferenceConfig(Section):
    """The model that the policy is held close to."""

    kind: Literal["auto", "cached", "live", "adapters_off", "none"] = "auto"
    """cached: scored once by the untrained policy and stored. live: a frozen sharded copy. adapters_off: the policy
    without its adapters. none: no reference, for losses that need none. auto: none for those losses; cached offline and
    with refresh: round; else adapters_off with model.lora and live without."""
    refresh: Literal["never", "round"] = "never"
    """round: online, the policy at the start of each round is that round's reference."""
    cache_dir: str | None = None
    """Folder of the reference cache and of tokenised data, shared by all runs; null puts it beside the user's other
    caches."""
    object_store: str | None = None
    """Folder in an object store, such as s3://bucket/reference: log-probabilities in the reference cache are shared
    through it with clusters that do not mount reference.cache_dir."""

    @model_validator(mode="after")
    def _placed(self) -> Self:
        if self.cache_dir and "://" in self.cache_dir:
            raise ValueError(
                f"reference.cache_dir is {self.cache_dir!r}: the cache is memory-mapped; give a local path or a mount, "
                "and reference.object_store to share its log-probabilities through an object store"
            )
        try:
            local = self.object_store is not None and not is_remote(folder_at(self.object_store))
        except ValueError as error:
            raise ValueError(f"reference.object_store: {error}") from None
        if local:
            raise ValueError(
                f"reference.object_store is {self.object_store!r}: give s3://bucket/path, or reference.cache_dir for a "
                "path"
            )
        return self

    @property
    def cache_path(self) -> Path:
        """The cache folder."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else Path.home() / ".cache" / "dpo_ray"


class DataConfig(Section):
    """Preference pairs."""

    train: Paths = ()
    """Files of pairs (JSON, JSONL, Parquet, Arrow) or hub datasets (name, or name:split)."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Passes over each entry of data.train in an epoch, such as [1, 0.25, 3]; over the epochs all pairs of an entry are
    seen equally often. Empty: one pass over all."""
    eval: Paths = ()
    """Held-out pairs; empty evaluates nothing offline."""
    max_prompt_tokens: int | None = Field(1024, ge=1)
    """Longer prompts are dropped and counted; null sets no limit."""
    max_completion_tokens: int | None = Field(1024, ge=1)
    """Longer completions are cut at their end and counted; null sets no limit."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many records of the training files."""
    shuffle: bool = True
    """Draw a new order each epoch; false keeps the order of the files."""
    strict: bool = False
    """Any dropped record is an error."""

    @model_validator(mode="after")
    def _weights_agree(self) -> Self:
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError(f"data.weights has {len(self.weights)} entries for {len(self.train)} in data.train")
        return self


class LossConfig(Section):
    """The preference loss."""

    use: Annotated[str | tuple[str, ...], _one_of("loss", LOSSES)] = "sigmoid"
    """Loss name or import path, or a list of them that is summed: sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair,
    nca_pair, sppo_hard, apo_zero, apo_down, discopop, dpop, and without a reference simpo, orpo, nll."""
    weights: tuple[float, ...] = ()
    """Factor of each loss in use; empty weighs all 1."""
    weighting: Literal["none", "wpo"] = "none"
    """Factor of each pair. wpo: how likely the policy is to write both completions (arXiv:2406.11827)."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull toward the reference policy; typical range 0.01 to 0.5, and 2 to 10 for losses per token."""
    args: dict[str, Any] = {}
    """Further arguments of the loss; with several losses, a mapping from a loss's name to its arguments."""

    @property
    def names(self) -> tuple[str, ...]:
        """The losses that are summed."""
        return (self.use,) if isinstance(self.use, str) else self.use

    @property
    def reference_free(self) -> bool:
        """Whether no loss in use looks at a reference."""
        return all(name in REFERENCE_FREE_LOSSES for name in self.names)

    @property
    def needing_reference(self) -> list[str]:
        """The built-in losses in use that look at a reference."""
        return [name for name in self.names if name in LOSSES and name not in REFERENCE_FREE_LOSSES]

    @model_validator(mode="after")
    def _terms_agree(self) -> Self:
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
    """Optimizer, schedule and batch."""

    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging constants."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's denominator offset."""
    use: Annotated[str, _one_of("optimizer", OPTIMIZERS)] = "adamw"
    """adamw. adamw_8bit: its state in a quarter of the memory (needs torchao: pip install 'dpo-ray[low_bit]'); resumes
    on the same number of workers. Or an import path: called with parameter groups, and lr, betas and eps where it takes
    arguments of these names."""
    args: dict[str, Any] = {}
    """Further keyword arguments of the optimizer."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    max_skipped_steps: int = Field(3, ge=0)
    """Steps in a row whose loss or gradient is not finite and that are therefore skipped; one more ends the run."""
    pairs_per_step: int = Field(32, ge=1)
    """Pairs in one optimizer step over all workers."""
    tokens_per_micro_batch: int = Field(4096, ge=1)
    """Most tokens one worker runs at a time; a longer single pair runs alone. A row that shard.context_parallel workers
    share has room for as many from each."""
    layout: Literal["shared", "plain"] = "shared"
    """shared: the prompt of a pair runs once. plain: it runs for chosen and rejected each; slower, to compare with."""


def _recomputing(value: Any) -> Any:
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class ShardConfig(Section):
    """How the model is laid over the workers."""

    replicate: int = Field(1, ge=1)
    """Replicas of the sharded model (HSDP); must divide cluster.train_workers."""
    context_parallel: int = Field(1, ge=1)
    """Neighbouring workers that share the tokens of each row, so that the activations of a long pair are spread over
    them."""
    tensor_parallel: int = Field(1, ge=1)
    """Neighbouring workers that split the matrices of each layer and the vocabulary, and work on the same tokens; must
    divide the model's attention heads and key-value heads. replicate * context_parallel * tensor_parallel must divide
    cluster.train_workers. Does not go with model.lora, model.fp8, optim.use: adamw_8bit, shard.compile or
    shard.activation_offload."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward; false keeps them until the step ends: faster, more memory."""
    prefetch: int = Field(1, ge=1)
    """Layers whose weights are gathered ahead of the one that computes; each takes the memory of its weights."""
    activation_checkpointing: Annotated[Literal["none", "full", "selective"], BeforeValidator(_recomputing)] = "none"
    """What of each layer is recomputed in the backward pass instead of stored. selective: all but matrix products and
    attention, for little time; not with shard.compile, which itself keeps little else. full: everything, for a third
    more time and the least memory."""
    activation_offload: bool = False
    """Keep what is stored for the backward pass in host memory; GPUs only. Of selective, the inputs of layers."""
    cpu_offload: bool = False
    """Keep shards and optimizer state in host memory; GPUs only."""
    compile: bool = False
    """Compile each decoder layer with torch.compile."""


class ClusterConfig(Section):
    """What the run takes of the cluster. GPUs are used when the cluster has them."""

    train_workers: int = Field(1, ge=1)
    """Training workers; one GPU each when the cluster has GPUs."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPUs, and torch threads on a CPU cluster, of one training worker."""
    rollout_engines: int = Field(1, ge=1)
    """vLLM engines, online only."""
    gpus_per_engine: int = Field(1, ge=1)
    """Tensor-parallel GPUs of one engine; ignored on a cluster without GPUs."""
    cpus_per_engine: int = Field(1, ge=1)
    """CPUs of one engine; its threads on a CPU cluster."""
    colocate: bool = False
    """Engines run on the GPUs of training workers and take turns with them: they sleep while training runs, their
    weights in host memory. Needs online.max_lag 0, and online.engine.gpu_memory_utilization that leaves room for the
    training state (or shard.cpu_offload). Without GPUs nothing is shared but the turns are the same."""
    max_restarts: int = Field(3, ge=0)
    """How often failed training workers are restarted from the last checkpoint before the run fails."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Longest wait for workers and engines to start."""
    stop_timeout_s: float = Field(120.0, gt=0)
    """Longest wait, after Ctrl-C or SIGTERM, for the run to reach a place it can go on from and write a checkpoint."""


class SamplingConfig(Section):
    """How engines write candidates."""

    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; rounds need one above 0, since greedy candidates would be the same."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus mass."""
    top_k: int = Field(0, ge=0)
    """Most likely tokens kept; 0 keeps all."""
    max_tokens: int = Field(256, ge=1)
    """Longest completion, in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion besides the model's end of turn."""


class EngineConfig(Section):
    """vLLM's own settings."""

    max_model_len: int | None = Field(None, ge=1)
    """Longest prompt plus completion; null takes data.max_prompt_tokens + online.sampling.max_tokens."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Key-value cache of one engine on a CPU, in GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of each GPU that vLLM takes."""
    enforce_eager: bool | None = None
    """Run without compilation and CUDA graphs: starts sooner, generates slower on GPUs; null does so on CPUs only."""
    args: dict[str, Any] = {}
    """Further arguments of vllm.LLM."""


class JudgeConfig(Component):
    """What scores completions."""

    use: Annotated[str, _one_of("judge", JUDGES)] = "length"
    """length, sentiment, or import path."""


class SelectConfig(Component):
    """What picks chosen and rejected."""

    use: Annotated[str, _one_of("selector", SELECTORS)] = "best_vs_worst"
    """best_vs_worst, random_pair, or import path."""


class SyncConfig(Component):
    """What moves weights to the engines."""

    use: Annotated[str, _one_of("transport", ("auto", *TRANSPORTS))] = "auto"
    """object_store: through Ray's object store, on CPUs and GPUs. nccl: a broadcast between GPUs, where engines have
    their own. ipc: CUDA IPC on the card itself, with cluster.colocate. auto: object_store without GPUs, else nccl or
    ipc. Or import path."""


class OnlineConfig(Section):
    """Rounds of generate, judge, select, train."""

    prompts: Paths
    """Prompts to write candidates for: files or hub datasets with a prompt (or messages) field."""
    eval_prompts: Paths = ()
    """Held-out prompts; the judge scores completions of them before, during and after the run."""
    rounds: int = Field(10, ge=1)
    """Rounds of the run."""
    prompts_per_round: int = Field(256, ge=1)
    """Prompts a round writes candidates for."""
    epochs_per_round: int = Field(1, ge=1)
    """Passes over a round's pairs."""
    candidates: int = Field(4, ge=2)
    """Completions sampled for each prompt."""
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    max_lag: int = Field(0, ge=0)
    """Rounds that generation may run ahead of training; 0 is on-policy."""
    judge: JudgeConfig = JudgeConfig()
    select: SelectConfig = SelectConfig()
    sync: SyncConfig = SyncConfig()
    kl_samples: int = Field(32, ge=1)
    """Completions of a round on which the policy's divergence from the reference is measured."""
    generate_timeout_s: float = Field(1800.0, gt=0)
    """Longest wait for a round's candidates."""
    judge_timeout_s: float = Field(600.0, gt=0)
    """Longest wait for a round's scores."""
    sync_timeout_s: float = Field(600.0, gt=0)
    """Longest wait for one push of weights."""
    probe_tolerance: float = Field(0.1, gt=0)
    """Largest mean absolute difference, in nats a token, between trainer and engine log-probabilities of a probe text
    after a push. Two bfloat16 implementations of the same weights differ by 0.03 to 0.06."""

    @model_validator(mode="after")
    def _candidates_differ(self) -> Self:
        if self.sampling.temperature == 0:
            raise ValueError(
                f"online.sampling.temperature is 0: all {self.candidates} candidates (online.candidates) would be the "
                "same text, and equal ones make no pair; set it above 0"
            )
        return self


class SweepConfig(Section):
    """How many trials a sweep runs; what it varies stands in its space, a module of tune_spaces."""

    samples: int | None = Field(None, ge=1)
    """Trials; null takes the space's own number."""
    concurrent: int | None = Field(None, ge=1)
    """Most trials at a time; null runs as many as the cluster holds."""


class Config(Section):
    """A run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    reference: ReferenceConfig = ReferenceConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    shard: ShardConfig = ShardConfig()
    cluster: ClusterConfig = ClusterConfig()
    online: OnlineConfig | None = None
    """Absent: training on a fixed preference set."""
    sweep: SweepConfig = SweepConfig()

    @model_validator(mode="before")
    @classmethod
    def _count_rounds(cls, tree: Any) -> Any:
        """A run of rounds saves and evaluates after each unless told otherwise."""
        if isinstance(tree, dict) and tree.get("online") and isinstance(run := tree.get("run", {}), dict):
            return {**tree, "run": {"save_every": 1, "eval_every": 1, **run}}
        return tree

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        validate_sections(self)
        return self

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus completion that an engine holds, in tokens."""
        assert self.online is not None
        longest = (self.data.max_prompt_tokens or 1024) + self.online.sampling.max_tokens
        return self.online.engine.max_model_len or longest

    @property
    def reference_kind(self) -> Literal["cached", "live", "adapters_off", "none"]:
        """``reference.kind`` with auto decided."""
        if self.reference.kind != "auto":
            return self.reference.kind
        if self.loss.reference_free:
            return "none"
        if self.online is None or self.reference.refresh == "round":
            return "cached"
        return "live" if self.model.lora is None else "adapters_off"
