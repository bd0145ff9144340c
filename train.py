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

from cocoa_pl.config.build import register_resolvers
from cocoa_pl.config.command_line import check_command_line
from cocoa_pl.config.folders import claimed, give_folder
from cocoa_pl.config.process import end_with_launcher, guarded, set_up_logging
from cocoa_pl.config.saved import resumed_config, settled
from cocoa_pl.distributed.processes import INTERRUPTED
from cocoa_pl.run import train

statuses: list[int] = []  # of the runs of a sweep, or of the one run


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    run_dir = Path(os.path.relpath(job.runtime.output_dir))

    def run() -> None:
        console = set_up_logging(run_dir)
        if cfg.resume:
            train(resumed_config(cfg, job.overrides.task), run_dir, console)
            return
        own = settled(cfg)
        with claimed(own, run_dir, job):
            train(own, run_dir, console)

    statuses.append(guarded(run))
    if job.mode == RunMode.MULTIRUN and statuses[-1] == INTERRUPTED:
        raise KeyboardInterrupt  # ends the sweep; a mistake in one run does not


def start() -> None:
    end_with_launcher()
    config = check_command_line("train")
    if config is not None:
        give_folder(config, way="hydra.run.dir=runs/NAME (or resume=RUN)")
    main()


if __name__ == "__main__":
    register_resolvers()
    sys.exit(guarded(start) or max(statuses, default=0))
