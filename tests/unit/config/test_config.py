"""The configuration: accepted and rejected values, error messages, and the round trip through YAML."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_ray.config.load as load_module
from dpo_ray.config import (
    Config,
    commands,
    config_from_argv,
    load_config,
    override,
    parse_overrides,
    with_absolute_paths,
    write_config,
)
from dpo_ray.config.load import ConfigError, help_text
from dpo_ray.config.paths import validate_paths

ROOT = Path(__file__).parents[3]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))

OFFLINE = "model: {path: tiny}\ndata: {train: pairs.jsonl}\n"
ONLINE = "model: {path: tiny}\nonline: {prompts: prompts.jsonl}\n"


@pytest.fixture
def offline(tmp_path) -> Path:
    return write(tmp_path / "offline.yaml", OFFLINE)


@pytest.fixture
def online(tmp_path) -> Path:
    return write(tmp_path / "online.yaml", ONLINE)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path, *arguments: str) -> Config:
    return load_config(path, parse_overrides(arguments))


# ------------------------------------------------------------------------------------------------------------- accepted


def test_the_file_wins_over_the_defaults_and_the_command_line_over_the_file(tmp_path):
    path = write(tmp_path / "c.yaml", OFFLINE + "loss: {beta: 0.2, use: ipo}\n")
    config = load(path, "loss.beta=0.3")
    assert (config.loss.beta, config.loss.use, config.optim.pairs_per_step) == (0.3, "ipo", 32)


def test_overrides_are_read_as_yaml(offline):
    config = load(
        offline,
        "optim.lr=1e-6",
        "data.eval=[a.jsonl, b.jsonl]",
        "loss.args={label_smoothing: 0.1}",
        "run.steps=null",
        "data.shuffle=false",
        "run.name='12'",
    )
    assert config.optim.lr == 1e-6
    assert config.data.eval == ("a.jsonl", "b.jsonl")
    assert config.loss.args == {"label_smoothing": 0.1}
    assert config.run.steps is None
    assert config.data.shuffle is False
    assert config.run.name == "12"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.0e-3", "0.001", "1.e-3"])
def test_a_number_in_component_arguments_is_a_number_however_it_is_written(online, text):
    config = load(online, f"online.select.args.min_gap={text}").online
    assert config
    assert config.select.args == {"min_gap": 0.001}


def test_a_number_in_quotes_stays_a_text(online):
    config = load(online, "online.judge.args.name='1e3'").online
    assert config
    assert config.judge.args == {"name": "1e3"}


def test_arguments_alone_keep_the_default_component(online):
    config = load(online, "online.judge.args.target_words=30").online
    assert config
    assert (config.judge.use, config.judge.args) == ("length", {"target_words": 30})


def test_online_runs_save_and_evaluate_every_round_by_default(online, offline):
    every = [(config.run.save_every, config.run.eval_every) for config in (load(online), load(offline))]
    assert every == [(1, 1), (100, 50)]
    chosen = load(online, "run.save_every=4", "run.eval_every=null")
    assert (chosen.run.save_every, chosen.run.eval_every) == (4, None)


@pytest.mark.parametrize(
    ("arguments", "refresh"),
    [
        ([], "round"),
        (["reference.kind=cached"], "round"),
        (["reference.mixup_alpha=0.5"], "round"),
        (["reference.refresh=never"], "never"),
        (["reference.refresh=3"], 3),
        (["reference.kind=live"], "never"),
        (["reference.kind=none", "loss.use=simpo"], "never"),
        (["loss.use=[simpo, nll]"], "never"),
        (["loss.use=[sigmoid, nll]"], "round"),
        (["online.source.use=candidates"], "never"),
    ],
    ids=str,
)
def test_self_play_refreshes_the_reference_each_round_by_default(online, arguments, refresh):
    config = load(online, "online.source.use=self_play", *arguments)
    assert config.reference.refresh == refresh
    assert override(config, {}) == config


@pytest.mark.parametrize("wrong", ["loss.use=5", "loss=5", "reference=5", "online.source=5", "run=5"])
def test_a_wrong_section_of_a_self_play_run_is_an_error_that_names_it(online, wrong):
    with pytest.raises(ConfigError, match=rf"override: {wrong.partition('=')[0]}\b.* found 5"):
        load(online, "online.source.use=self_play", wrong)


def test_one_path_is_a_list_of_one(offline):
    assert load(offline).data.train == ("pairs.jsonl",)


def test_override_validates_in_full_and_leaves_its_inputs_alone(offline):
    config = load(offline)
    args = {"label_smoothing": 0.1}
    changed = override(config, {"loss.args": args, "loss.args.other": 1, "loss.beta": 0.5})
    assert changed.loss.args == {"label_smoothing": 0.1, "other": 1}
    assert args == {"label_smoothing": 0.1}
    assert config.loss.beta == 0.1
    with pytest.raises(ConfigError, match=r"loss.beta: found -1; .*greater than 0"):
        override(config, {"loss.beta": -1})


@pytest.mark.parametrize("text", [OFFLINE, ONLINE + "loss: {args: {a: '1e3', b: 1e-7, c: 'é'}}\n"])
def test_a_written_config_reads_back_equal(tmp_path, text):
    config = load(write(tmp_path / "c.yaml", text), "run.name='1e3'", "run.dir=ü")
    write_config(config, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == config


def test_an_interrupted_write_leaves_the_earlier_configuration(offline, tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    write_config(load(offline, "loss.beta=0.3"), file)

    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpo_ray.storage.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_config(load(offline, "loss.beta=0.4"), file)
    assert load(file).loss.beta == 0.3


def test_the_tree_is_frozen(offline):
    with pytest.raises(ValueError, match="frozen"):
        load(offline).loss.beta = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_shipped_job_loads(path):
    load_config(path)


def test_engines_of_a_policy_that_judges_have_room_for_two_completions_instructions_and_a_reply(tmp_path):
    text = """
model: {path: org/name}
data: {max_prompt_tokens: 100}
online: {prompts: p.jsonl, sampling: {max_tokens: 50}}
"""
    file = write(tmp_path / "c.yaml", text)
    assert load(file).max_model_len == 150
    assert load(file, "online.judge.use=policy").max_model_len == 100 + 2 * 50 + 1024
    assert load(file, "online.judge.use=policy", "online.engine.max_model_len=700").max_model_len == 700


def test_component_names_in_the_schema_match_the_registries():
    from dpo_ray.config import losses, rounds
    from dpo_ray.objective.build import DIVERGENCES
    from dpo_ray.objective.losses import LOSSES
    from dpo_ray.rollout.judges import JUDGES
    from dpo_ray.rollout.selectors import SELECTORS
    from dpo_ray.sync import TRANSPORTS

    assert set(losses.LOSSES) == set(LOSSES)
    assert set(losses.DIVERGENCES) == set(DIVERGENCES)
    assert set(rounds.JUDGES) == set(JUDGES)
    assert set(rounds.SELECTORS) == set(SELECTORS)
    assert set(rounds.TRANSPORTS) == set(TRANSPORTS)


@pytest.mark.parametrize(
    ("text", "overrides", "kind"),
    [
        (OFFLINE, [], "cached"),
        (ONLINE, [], "live"),
        (ONLINE, ["reference.refresh=round"], "cached"),
        (ONLINE, ["reference.refresh=1"], "cached"),
        (ONLINE, ["reference.refresh=2"], "live"),
        (ONLINE, ["reference.refresh=2", "reference.kind=live"], "live"),
        (ONLINE, ["reference.refresh=round", "reference.mixup_alpha=0.5"], "live"),
        (ONLINE, ["reference.refresh=2", "model.lora.rank=4"], "adapters"),
        (ONLINE, ["reference.refresh=2", "model.lora.quantize=nf4"], "adapters"),
        (ONLINE, ["reference.refresh=round", "model.lora.rank=4"], "cached"),
        (ONLINE, ["model.lora.rank=4"], "adapters_off"),
        (ONLINE, ["loss.use=simpo"], "none"),
        (OFFLINE, ["loss.use=simpo"], "none"),
    ],
)
def test_reference_kind_auto_depends_on_what_can_be_cached(tmp_path, text, overrides, kind):
    assert load(write(tmp_path / "c.yaml", text), *overrides).reference_kind == kind


# ------------------------------------------------------------------------------------------------------------- rejected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optim.lrr=1", r"optim.lrr: no such key; did you mean optim.lr\?"),
        ("optm.lr=1", r"optm: no such key; did you mean optim\?"),
        ("beta=0.2", r"beta: no such key; did you mean loss.beta\?"),
        ("online.temperature=1", r"online.temperature: no such key; did you mean online.sampling.temperature\?"),
        ("optim.learning_rate=1", r"optim.learning_rate: no such key; optim has the keys lr, schedule, "),
        ("nonsense=1", "nonsense: no such key; --help lists every key"),
    ],
)
def test_an_unknown_key_is_reported_with_the_closest_one(online, argument, message):
    with pytest.raises(ConfigError, match=message):
        load(online, argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("loss.beta=-1", "loss.beta: found -1; input should be greater than 0"),
        ("loss.beta=high", "loss.beta: found 'high'; input should be a valid number"),
        (
            "loss.divergence=kl",
            "loss.divergence: found 'kl'; input should be reverse_kl, forward_kl, js or a number between 0 and 1",
        ),
        ("loss.divergence=1.0", "loss.divergence: found 1.0; input should be reverse_kl"),
        ("loss={use: dpop, divergence: js}", "loss.divergence is 'js': it applies to losses of the margin"),
        ("loss={use: aot, weighting: wpo}", "loss.weighting: wpo multiplies the loss of a pair"),
        ("loss={use: aot, weighting: gap}", "loss.weighting: gap multiplies the loss of a pair"),
        ("optim.lr=.nan", "optim.lr: found nan; input should be a finite number"),
        ("optim.lr=.inf", "optim.lr: found inf; input should be a finite number"),
        ("optim.schedule=step", "optim.schedule: found 'step'; input should be 'linear', 'cosine' or 'constant'"),
        ("data.eval=null", "data.eval: found null; it must be a list, such as [a, b]; [] is none"),
        ("optim.betas=3", "optim.betas: found 3; it must be a list, such as [a, b]"),
        ("optim.pairs_per_step=0", "optim.pairs_per_step: found 0; input should be greater than or equal to 1"),
        ("optim.pairs_per_step=1.5", "optim.pairs_per_step: found 1.5; input should be a valid integer"),
        ("model.lora={r: 8}", "model.lora.r: no such key; did you mean model.lora.rank?"),
        ("online.candidates=1", "online.candidates is 1: a pair is made of two completions; set it to 2 or more"),
        ("online.sampling.min_p=1.5", "online.sampling.min_p: found 1.5; input should be less than or equal to 1"),
        (
            "online.sampling.repetition_penalty=0",
            "online.sampling.repetition_penalty: found 0; input should be greater",
        ),
        (
            "online.sampling={min_tokens: 9, max_tokens: 8}",
            "online.sampling.min_tokens is 9; it must be at most online.sampling.max_tokens, 8",
        ),
        (
            "online.sampling.stop_token_ids=[-1]",
            "online.sampling.stop_token_ids.0: found -1; input should be greater than or equal to 0",
        ),
        ("online.judge=length", "online.judge: found 'length'; it must be a mapping of keys to values"),
        ("loss.beta.x=1", "loss.beta.x: loss.beta is 0.1 and has no keys"),
        (
            "run.dir=s3://bucket/runs",
            "run.dir is 's3://bucket/runs': several processes of an online run read its rounds",
        ),
        *(
            (
                f"reference.refresh={value}",
                f"reference.refresh: found {found}; input should be never, round or a number of rounds from 1",
            )
            for value, found in (("0", "0"), ("1.5", "1.5"), ("true", "true"), ("always", "'always'"), ("null", "null"))
        ),
        ("reference.mixup_alpha=0", "reference.mixup_alpha: found 0; input should be greater than 0"),
        ("reference.mixup_alpha=1.1", "reference.mixup_alpha: found 1.1; input should be less than or equal to 1"),
        ("run.name=a/b", "run.name is 'a/b': it must be a plain folder name"),
    ],
)
def test_a_bad_value_is_reported_with_key_found_and_accepted_values(tmp_path, argument, message):
    path = write(tmp_path / "c.yaml", ONLINE + "loss: {beta: 0.1}\n")
    with pytest.raises(ConfigError) as error:
        load(path, argument)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (
            OFFLINE,
            ["shard.replicate=2", "cluster.train_workers=3"],
            "shard.replicate (2) must divide cluster.train_workers (3)",
        ),
        (
            OFFLINE,
            ["shard.replicate=2", "shard.context_parallel=3", "cluster.train_workers=4"],
            "shard.replicate (2) * shard.context_parallel (3) must divide cluster.train_workers (4)",
        ),
        (
            OFFLINE,
            ["shard.replicate=2", "shard.tensor_parallel=2", "cluster.train_workers=6"],
            "shard.replicate (2) * shard.tensor_parallel (2) must divide cluster.train_workers (6)",
        ),
        (
            OFFLINE,
            ["model.attention=sdpa", "shard.context_parallel=2", "cluster.train_workers=2"],
            "set model.attention: auto or flex",
        ),
        (
            OFFLINE,
            ["loss.router_aux=0.1", "shard.context_parallel=2", "cluster.train_workers=2"],
            "loss.router_aux: 0.1 needs whole sequences, which shard.context_parallel (2) splits",
        ),
        *(
            (
                OFFLINE,
                ["shard.tensor_parallel=2", "cluster.train_workers=2", setting],
                f"{named} is not supported with tensor parallelism",
            )
            for setting, named in (
                ("model.lora.rank=4", "model.lora"),
                ("model.fp8=true", "model.fp8"),
                ("shard.compile=true", "shard.compile"),
                ("optim.use=adamw_8bit", "optim.use: adamw_8bit"),
                ("shard.activation_offload=true", "shard.activation_offload"),
            )
        ),
        (OFFLINE, ["reference.refresh=round"], "reference.refresh: round needs rounds"),
        (ONLINE, ["reference.refresh=round", "reference.kind=live"], "set reference.kind: auto or cached"),
        (OFFLINE, ["reference.refresh=3"], "reference.refresh: 3 needs rounds"),
        (ONLINE, ["reference.mixup_alpha=0.6"], "reference.mixup_alpha: 0.6 is the policy's share in a refresh"),
        (
            ONLINE,
            ["reference.refresh=3", "reference.kind=none", "loss.use=simpo"],
            "reference.refresh: 3 changes the reference, and reference.kind: none has none",
        ),
        (
            ONLINE,
            ["reference.refresh=round", "loss.use=simpo"],
            "reference.refresh: round changes the reference, and loss.use: 'simpo' has none; set refresh: never",
        ),
        (
            ONLINE,
            ["reference.refresh=3", "reference.kind=cached"],
            "reference.refresh: 3 changes a copy of the trained weights, reference.kind: cached is the policy of the",
        ),
        (
            ONLINE,
            ["reference={refresh: round, mixup_alpha: 0.5, kind: adapters_off}", "model.lora.rank=4"],
            "reference.refresh: round with mixup_alpha: 0.5 changes a copy of the trained weights, reference.kind: "
            "adapters_off is the policy without its adapters",
        ),
        (
            ONLINE,
            ["reference.refresh=3", "reference.kind=live", "model.lora.rank=4"],
            "reference.refresh: 3 with model.lora changes a copy of the adapters, reference.kind: live is a",
        ),
        (
            ONLINE,
            ["loss.weighting=gap", "online.source.mix=0.5", "data.train=p"],
            "online.source.mix (0.5) adds have another unit than the judge's",
        ),
        (ONLINE, ["reference.kind=cached"], "reference.kind: cached needs the untrained policy"),
        (
            ONLINE,
            ["online.sync.use=ipc"],
            "online.sync.use: ipc needs engine and trainer on the same GPU",
        ),
        (ONLINE, ["cluster.colocate=true", "online.max_lag=1"], "online.max_lag is 1: with cluster.colocate"),
        (ONLINE, ["cluster.colocate=true", "online.sync.use=nccl"], "NCCL rejects two ranks on one GPU"),
        (ONLINE, ["online.sync.use=lora"], "give model.lora, without quantize"),
        (ONLINE, ["online.sync.use=lora", "model.lora.quantize=nf4"], "give model.lora, without quantize"),
        (ONLINE, ["online.sync.use=lora", "model.lora.rank=4", "cluster.colocate=true"], "is not for cluster.colocate"),
        (ONLINE, ["cluster.colocate=true", "cluster.rollout_engines=2"], "is 2, more than cluster.train_workers (1)"),
    ],
)
def test_incompatible_sections_are_rejected(tmp_path, text, arguments, message):
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path / "c.yaml", text), *arguments)
    assert message in str(error.value)


def test_an_error_is_attributed_to_the_override_or_to_the_file(tmp_path):
    file = write(tmp_path / "c.yaml", OFFLINE + "loss: {beta: -1}\n")
    with pytest.raises(ConfigError) as error:
        load(file, "optm.lr=1", "optim.lr=-1")
    assert set(str(error.value).replace("\n       ", "\n").splitlines()) == {
        f"{file}: loss.beta: found -1; input should be greater than 0",
        "override: optim.lr: found -1; input should be greater than 0",
        "override: optm: no such key; did you mean optim?",
    }


def test_all_problems_are_reported_at_once(offline):
    with pytest.raises(ConfigError) as error:
        load(offline, "loss.beta=-1", "optim.lrr=1")
    assert "loss.beta: found -1" in str(error.value)
    assert "optim.lrr: no such key" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: {beta: 0.1}\n", "model: is required"),
        ("", "model: is required"),
        ("model: {path: x\n", "not valid YAML"),
        ("- a\n- b\n", "found a list; a configuration is a mapping of sections"),
    ],
)
def test_the_error_names_an_invalid_configuration_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=rf"broken.yaml: .*{message}"):
        load(write(tmp_path / "broken.yaml", text))


def test_the_error_names_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read: No such file"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("argument", ["optim.lr", "=1", "--lr"])
def test_an_argument_that_is_no_override_is_rejected(argument):
    with pytest.raises(ConfigError, match="is not an override; write key=value"):
        parse_overrides([argument])


# --------------------------------------------------------------------------------------------------------- command line


def leaves(section, prefix=""):
    """Dotted keys of a validated tree, found by walking the values."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if hasattr(type(value), "model_fields"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_help_lists_every_key_with_type_default_and_meaning(online, capsys):
    with pytest.raises(SystemExit) as end:
        config_from_argv("DPO on fresh pairs.", commands.ONLINE, ["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("DPO on fresh pairs.")
    lines = printed.splitlines()
    optional = ("model.lora={rank: 8}", "online.eval_judge={use: length}", "sweep.constraint={metric: kl, max: 9}")
    for key in leaves(load(online, *optional)):
        [at] = [i for i, line in enumerate(lines) if line.startswith(f"{key}: ")]
        assert " = " in lines[at] or lines[at].endswith(" (required)")
        assert lines[at + 1].startswith("    ")
        assert len(lines[at + 1].strip()) > 10


@pytest.mark.parametrize(
    "line",
    [
        "model.path: str (required)",
        "loss.beta: float (> 0) = 0.1",
        "run.steps: int (>= 1) | null = null",
        "optim.schedule: linear | cosine | constant = linear",
        "data.shuffle: bool = true",
        "data.train: list of str = []",
        "online.judge.use: str = length",
    ],
)
def test_help_shows_types_bounds_and_defaults(line):
    assert line in help_text().splitlines()


def test_without_arguments_the_command_prints_its_help_and_fails(capsys):
    with pytest.raises(SystemExit) as end:
        config_from_argv("DPO.", commands.OFFLINE, [])
    assert end.value.code == 2
    assert "loss.beta" in capsys.readouterr().out


def test_a_missing_bitsandbytes_is_reported_with_the_command_that_installs_it(offline, capsys, monkeypatch):
    monkeypatch.setattr(load_module, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        config_from_argv("DPO.", commands.OFFLINE, [str(offline), "model.lora={quantize: nf4}"])
    assert end.value.code == 2
    assert "model.lora.quantize: nf4 needs bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["optim.use=adamw_8bit", "model.fp8=true"])
def test_a_missing_torchao_is_reported_with_the_command_that_installs_it(offline, capsys, monkeypatch, setting):
    monkeypatch.setattr(load_module, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        config_from_argv("DPO.", commands.OFFLINE, [str(offline), setting])
    assert end.value.code == 2
    assert "needs torchao, which is not installed: pip install 'dpo-ray[low_bit]'" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "mode"), [("true", "full"), ("false", "none"), ("selective", "selective")])
def test_activation_checkpointing_accepts_a_mode_or_a_boolean(offline, value, mode):
    assert load(offline, f"shard.activation_checkpointing={value}").shard.activation_checkpointing == mode


def test_selective_checkpointing_of_compiled_layers_is_rejected(offline):
    with pytest.raises(ConfigError, match=r"shard\.compile is not supported with .*: selective"):
        load(offline, "shard.compile=true", "shard.activation_checkpointing=selective")


@pytest.mark.parametrize("setting", ["model.lora={rank: 4}", "model.dtype=float32"])
def test_fp8_with_adapters_or_float32_is_rejected(offline, setting):
    with pytest.raises(ConfigError, match=r"model\.fp8"):
        load(offline, "model.fp8=true", setting)


def test_a_live_reference_of_a_quantized_model_is_rejected(offline):
    with pytest.raises(ConfigError, match=r"reference\.kind: live would load a second, unquantized model"):
        load(offline, "model.lora={quantize: nf4}", "reference.kind=live")


def test_an_invalid_configuration_exits_with_code_2(offline, capsys):
    with pytest.raises(SystemExit) as end:
        config_from_argv("DPO.", commands.OFFLINE, [str(offline), "optim.lrr=1"])
    assert end.value.code == 2
    assert "optim.lrr: no such key" in capsys.readouterr().err


def test_loading_a_config_imports_neither_torch_nor_ray_and_takes_less_than_three_seconds(offline):
    code = (
        "import sys; from dpo_ray.config import load_config\n"
        f"load_config({str(offline)!r})\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    before = os.times()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    after = os.times()
    assert sum(after[2:4]) - sum(before[2:4]) < 3.0, "processor time, which other work does not lengthen"


def test_patterns_splits_and_compressed_files_are_local_paths(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv"):
        (tmp_path / "data" / name).touch()
    monkeypatch.chdir(tmp_path)
    sources = ["data/*.jsonl", "data/b.jsonl.gz", "data/c.csv", "data:train", "./data/**/*.csv"]
    config = Config.model_validate({"model": {"path": "org/name"}, "data": {"train": sources}})
    validate_paths(config)
    absolute = [str(tmp_path / source.removeprefix("./")) for source in sources]
    assert list(with_absolute_paths(config).data.train) == absolute
    for missing in ("data/*.parquet", "data/none.csv", "data/none.jsonl.gz"):
        broken = Config.model_validate({"model": {"path": "org/name"}, "data": {"train": missing}})
        with pytest.raises(ValueError, match=r"no such file or folder; accepted are \.json .*patterns such as"):
            validate_paths(broken)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["online.source.mix=0.5"], "data.train is empty: give pairs to mix in"),
        (["online.source.mix=0.5", "data.train=p.jsonl", "data.weights=[1]"], "takes all pairs of data.train evenly"),
        (["online.source={mix: 0.6, replay: 0.4}"], "leave nothing for new pairs"),
        (["online.source.replay=0.001"], "online.source.replay is 0.001, which is no pair in a round"),
        (["online.source.replay=0.5", "online.keep_rounds=4"], "set online.keep_rounds to 5 or more"),
        (["online.source.replay=0.5", "online.keep_rounds=9", "run.save_every=null"], "set online.keep_rounds to null"),
        (["online.judge.use=implicit", "reference.refresh=round"], "compares the policy with the reference"),
        (["online.judge.use=implicit"], "without other pairs the policy never comes to differ from it"),
        (
            ["online.judge={use: llm, args: {model: m}}", "online.eval_prompts=p.jsonl"],
            "online.judge.use: llm compares completions in pairs, and a held-out prompt has one",
        ),
        (
            ["online.eval_judge={use: policy, args: {mode: pairwise}}", "online.eval_prompts=p.jsonl"],
            "online.eval_judge.use: policy compares completions in pairs",
        ),
        (
            [
                "online.judge={use: weighted, args: {judges: [{use: llm, args: {model: m}}]}}",
                "online.eval_prompts=p.jsonl",
            ],
            "online.judge.args.judges[0].use: llm compares completions in pairs, and a held-out prompt has one",
        ),
        (
            [
                "online.eval_judge={use: weighted, args: {judges: [{use: length}, {use: weighted, args: {judges: "
                "[{use: length}, {use: policy, args: {mode: pairwise}}]}}]}}",
                "online.eval_prompts=p.jsonl",
            ],
            "online.eval_judge.args.judges[1].args.judges[1].use: policy compares completions in pairs",
        ),
        (["run.best_metric=eval/loss"], "evaluations of an online run have heldout/score, heldout/win_rate, kl"),
        (["run.best_metric=heldout/score"], "give online.eval_prompts"),
        (["run.best_metric=kl", "reference.refresh=round"], "needs a reference that is held"),
        (["run.best_metric=kl", "cluster.colocate=true"], "is not supported with cluster.colocate"),
    ],
)
def test_sources_and_best_checkpoints_that_cannot_work_are_rejected(online, overrides, said):
    with pytest.raises(ConfigError) as error:
        load(online, *overrides)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("keep", "save_every", "kept"),
    [("0", "1", 1), ("5", "1", 5), ("5", "10", 19), ("30", "10", 30), ("5", "null", 5), ("null", "10", None)],
)
def test_rounds_that_a_resumed_run_trains_again_are_kept(online, keep, save_every, kept):
    """Of 29 rounds, with the checkpoint of 20 incomplete, a run resumes from that of 10: with rounds 10 to 28."""
    assert load(online, f"online.keep_rounds={keep}", f"run.save_every={save_every}").kept_rounds == kept


@pytest.mark.parametrize(
    "judges",
    ["[]", "[{use: [a]}]", "[{use: llm, args: x}]", "[{use: llm, args: {model: m}, weight: 0}, {use: length}]"],
)
def test_what_a_weighted_judge_holds_is_checked_where_it_is_bound(online, judges):
    judge = load(online, f"online.judge={{use: weighted, args: {{judges: {judges}}}}}", "online.eval_prompts=p.jsonl")
    assert judge.online is not None
    assert judge.online.judge.comparing is None


@pytest.mark.parametrize(
    ("judge", "groups"),
    [
        ("{use: length}", 16),
        ("{use: policy}", 1),
        ("{use: weighted, args: {judges: [{use: length}, {use: http}]}}", 1),
        ("{use: weighted, args: {judges: [{use: weighted, args: {judges: [{use: llm}]}}]}}", 1),
        ("{use: policy, batch: 4}", 4),
    ],
)
def test_judges_whose_requests_overlap_are_called_for_one_group_at_a_time(online, judge, groups):
    parsed = load(online, f"online.judge={judge}").online
    assert parsed is not None
    assert parsed.judge.groups_per_call == groups
