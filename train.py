"""Train stages of CoCoA: `python train.py` runs the whole recipe on the embedded digits with a tiny
model.

    python train.py stage=reconstruct model=qwen2vl adapter=dora data=pairs data.path=my.jsonl
    python train.py -m seed=0,1,2 attention@stage.contrast.policy=causal,bidirectional
    python train.py resume=RUN
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cocoa_pl.assemble import train
from cocoa_pl.command_line import check_command_line
from cocoa_pl.entry import (
    INTERRUPTED,
    check_run_folder,
    end_with_launcher,
    guarded,
    register_resolvers,
    resumed_config,
    set_up_logging,
)

statuses: list[int] = []  # of the runs of a sweep, or of the one run


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    run_dir = Path(os.path.relpath(job.runtime.output_dir))

    def run() -> None:
        if job.mode == RunMode.RUN and not cfg.resume:
            check_run_folder(job.overrides.hydra)
        console = set_up_logging(run_dir)
        resumed = resumed_config(cfg, job.overrides.task) if cfg.resume else cfg
        train(resumed, run_dir, console)

    statuses.append(guarded(run))
    if job.mode == RunMode.MULTIRUN and statuses[-1] == INTERRUPTED:
        raise KeyboardInterrupt  # ends the sweep; a mistake in one run does not


def start() -> None:
    end_with_launcher()
    check_command_line("train")
    main()


if __name__ == "__main__":
    register_resolvers()
    sys.exit(guarded(start) or max(statuses, default=0))
