"""The configuration and its loading. Imports neither torch nor Ray, so that a typo is reported within a second."""

from dpo_ray.config.commands import INSPECT, OFFLINE, ONLINE, sweep_command
from dpo_ray.config.load import (
    config_from_argv,
    load_config,
    override,
    parse_overrides,
    write_config,
)
from dpo_ray.config.paths import with_absolute_paths
from dpo_ray.config.resume import first_difference
from dpo_ray.config.section import Component
from dpo_ray.config.tree import Config

__all__ = [
    "INSPECT",
    "OFFLINE",
    "ONLINE",
    "Component",
    "Config",
    "config_from_argv",
    "first_difference",
    "load_config",
    "override",
    "parse_overrides",
    "sweep_command",
    "with_absolute_paths",
    "write_config",
]
