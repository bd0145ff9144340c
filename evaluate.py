"""Score a model on a benchmark: `python evaluate.py ckpt=RUN_OR_EXPORT`.

RUN_OR_EXPORT is a run folder, a .ckpt, an exported folder or a hub id. Writes results.json and
report.html. With store=FOLDER vectors are kept there: the command goes on where it was killed, and
several processes share the work:

    torchrun --nproc-per-node=2 evaluate.py ckpt=RUN store=FOLDER hydra.run.dir=runs/NAME
"""

import os
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import run_app
from cocoa_pl.config.folders import claim_for_scores
from cocoa_pl.config.process import launched_processes, set_up_logging
from cocoa_pl.distributed.collectives import world_size
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.vectors import VectorSettings
from cocoa_pl.for_mteb.benchmark import MtebBenchmark
from cocoa_pl.run import open_embedder, score


def main(cfg: DictConfig) -> None:
    """Score a model in a folder of its own, or in that of its run."""
    if OmegaConf.is_missing(cfg, "ckpt") or not cfg.ckpt:
        raise UserError("say which model to score: python evaluate.py ckpt=RUN_OR_EXPORT")
    run_dir = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    claim_for_scores(cfg, run_dir)
    console = set_up_logging(run_dir)
    with launched_processes():
        benchmark = build(cfg.benchmark)
        several = world_size() > 1
        if isinstance(benchmark, MtebBenchmark) and (several or cfg.store is not None):
            raise UserError("benchmark=mteb runs in one process and has no store")
        if several and cfg.store is None:
            raise UserError(
                "several processes share vectors through a folder; give it as store=FOLDER"
            )
        embedder = open_embedder(cfg.ckpt, device=cfg.device)
        kept = f"{cfg.store_dtype}, in {cfg.store}"
        facts = {"vectors": "float32, in memory" if cfg.store is None else kept}
        score(
            embedder,
            benchmark,
            run_dir,
            console,
            path=cfg.ckpt,
            facts={"attention": embedder.policy.name, **facts},
            vectors=VectorSettings(
                batch_tokens=cfg.batch_tokens,
                threads=cfg.threads,
                store=None if cfg.store is None else Path(cfg.store),
                store_dtype=cfg.store_dtype,
            ),
        )


if __name__ == "__main__":
    remedy = "the same command goes on with what its store holds"
    sys.exit(run_app("evaluate", main, sys.argv[1:], remedy=remedy))
