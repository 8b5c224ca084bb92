"""The section ``online``: engines, judges, selectors and sources of the rounds."""

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, model_validator

from dpo_ray.config.section import Component, Paths, Section, one_of

# The names of built-in components are repeated here, so that a wrong name is rejected before torch is imported. A test
# compares them with the registries.
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
    args: dict[str, Any] = Field({})
    """Further keyword arguments of vllm.LLM."""


class JudgeConfig(Component):
    """The judge, which scores completions."""

    use: Annotated[str, one_of("judge", JUDGES)] = "length"
    """Judge, or an import path. reward_model: a Hugging Face sequence classifier in the judge's process. http: a reward
    server of OpenRLHF, vLLM or SGLang. llm: a language model behind an OpenAI-compatible endpoint. policy: the policy
    itself, by the run's engines. implicit: loss.beta times the log-ratio of policy and reference. exact, regex,
    json_schema, math: compare with a field of the record. weighted: a sum of several. length, sentiment: for tests and
    demos."""
    replicas: int = Field(1, ge=1)
    """Number of judge processes."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs of each judge process, also a fraction; a judge without one sees none."""
    batch: int | None = Field(None, ge=1)
    """Maximum number of prompts per call of the judge; those that wait are spread over the calls that may begin. null
    is 1 for llm, policy and http, whose requests overlap anyway, and 16 for others."""
    concurrency: int | None = Field(None, ge=1)
    """Calls in progress per replica; null is what the judge asks for (llm, policy and http: as many as keep
    args.concurrency requests in flight), else 32 for one that is an async function, and 1 for others, which need not be
    thread-safe."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds to wait for one call; then the judge's process is restarted."""

    retries: int = Field(1, ge=0)
    """Further attempts for a prompt whose completions the judge failed to score."""

    def asks(self, name: str) -> bool:
        """True if the judge, or a part of a weighted one, is the built-in judge ``name``."""
        return any(part.use == name for part in self.parts())

    @property
    def groups_per_call(self) -> int:
        """``batch``, or the default of the judge."""
        return self.batch or (1 if any(map(self.asks, ("llm", "policy", "http"))) else 16)

    @property
    def comparing(self) -> "JudgePart | None":
        """The first part that compares the completions of a prompt, and has no score for a single one."""
        default = {"llm": "pairwise", "policy": "score"}
        modes = [(part, part.args.get("mode", default[part.use])) for part in self.parts() if part.use in default]
        return next((part for part, mode in modes if mode == "pairwise" and part.weight), None)

    def parts(self) -> list["JudgePart"]:
        """The judge, and the valid parts of a weighted one, also of those in it."""
        return _parts(JudgePart("", self.use, self.args))


class JudgePart(NamedTuple):
    """A judge, or a part of a weighted one.

    Attributes:
        key: below ``online.judge``: empty for the judge itself, else such as ``.args.judges[0]``.
        weight: 0 for a part whose scores are stored and not added.
    """

    key: str
    use: str
    args: dict[str, Any]
    weight: Any = 1.0


def _parts(judge: JudgePart) -> list[JudgePart]:
    listed = judge.args.get("judges") if judge.use == "weighted" else None
    parts = [judge]
    for number, part in enumerate(listed if isinstance(listed, list | tuple) else ()):
        use, args = (part.get("use"), part.get("args") or {}) if isinstance(part, dict) else (None, None)
        if isinstance(use, str) and isinstance(args, dict):
            weight = part.get("weight", 1.0) and judge.weight
            parts += _parts(JudgePart(f"{judge.key}.args.judges[{number}]", use, args, weight))
    return parts


class SelectConfig(Component):
    """The selector, which picks the pairs of chosen and rejected completions of a prompt."""

    use: Annotated[str, one_of("selector", SELECTORS)] = "best_vs_worst"
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

    use: Annotated[str, one_of("transport", ("auto", *TRANSPORTS))] = "auto"
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
    """Number of past rounds whose texts, token ids and replies of judges are kept; null keeps all. At least
    2 * run.save_every - 1 are kept, since a resumed run may train them again; a run without checkpoints, which starts
    over, generates those again that are not kept. Manifests are always kept."""
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

    @property
    def same_scale(self) -> bool:
        """True if the scores of rounds and those of held-out completions are of one judge."""
        judges = self.judges
        return len(judges) == 2 and judges["judge"] == judges["eval_judge"]

    @property
    def started_judges(self) -> dict[str, JudgeConfig]:
        """The judges that the run starts, by the key of their settings: one with both purposes is started once."""
        return {"judge" if judge == self.judge else "eval_judge": judge for judge in self.judges.values()}

    @model_validator(mode="after")
    def _validate_judges(self) -> Self:
        evaluated = self.eval_judge or self.judge
        if self.eval_prompts and evaluated.use == IMPLICIT:
            raise ValueError(
                "online.judge.use: implicit compares policy and reference, which says nothing of held-out completions; "
                "set online.eval_judge, or leave out online.eval_prompts"
            )
        if self.eval_prompts and (part := evaluated.comparing) is not None:
            key = "eval_judge" if self.eval_judge else "judge"
            raise ValueError(
                f"online.{key}{part.key}.use: {part.use} compares completions in pairs, and a held-out prompt has one; "
                "set online.eval_judge, for example the same judge with args.mode: score, or leave out "
                "online.eval_prompts"
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
