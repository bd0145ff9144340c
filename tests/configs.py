"""Configs of conf/ as Hydra composes them for a script."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from cocoa_pl.config.build import register_resolvers
from cocoa_pl.config.command_line import CONFIGS

register_resolvers()


def composed(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=list(overrides))
