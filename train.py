"""Train stages of CoCoA: `python train.py` runs the whole recipe on the embedded digits with a tiny
model.

    python train.py stage=reconstruct model=qwen2vl adapter=dora data=pairs data.path=my.jsonl
    python train.py -m seed=0,1,2 attention@stage.contrast.policy=causal,bidirectional
    python train.py resume=RUN
"""

import os
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cocoa_pl.config.command_line import run_app
from cocoa_pl.config.folders import check_free_for_run, claimed, hand_over, run_of
from cocoa_pl.config.process import end_with_launcher, set_up_logging
from cocoa_pl.config.saved import resumed_config, settled
from cocoa_pl.run import train


def main(cfg: DictConfig) -> None:
    """Run the stages of a config in a new folder, or go on in that of the run to resume."""
    job = HydraConfig.get()
    if cfg.resume is not None:
        run_dir, words = run_of(cfg.resume), list(job.overrides.task)
        console = set_up_logging(run_dir)
        own = resumed_config(cfg, words)
        if job.mode == RunMode.MULTIRUN:
            hand_over(run_dir, [word for word in words if not word.startswith("resume=")])
        train(own, run_dir, console)
        return
    run_dir = Path(os.path.relpath(job.runtime.output_dir))
    check_free_for_run(run_dir)
    console = set_up_logging(run_dir)
    own = settled(cfg)
    with claimed(own, run_dir):
        hand_over(run_dir)
        train(own, run_dir, console)


if __name__ == "__main__":
    end_with_launcher()
    sys.exit(run_app("train", main, sys.argv[1:]))
