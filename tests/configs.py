"""Configs of conf/ as Hydra composes them for a command."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from cocoa_pl.config.command_line import CONFIGS, compose_overrides


def composed(*overrides: str, name: str = "train") -> DictConfig:
    return deepcopy(_composed(name, overrides))  # composing takes a third of a second


@functools.cache
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    return compose_overrides(name, overrides)


@contextmanager
def started(*overrides: str) -> Iterator[DictConfig]:
    """The config of train.py, with Hydra as it is while the command runs."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        try:
            yield cfg
        finally:
            HydraConfig.instance().cfg = None
