"""Score a model on a benchmark: `python evaluate.py ckpt=RUN_OR_EXPORT`.

RUN_OR_EXPORT is a run folder, a .ckpt, an exported folder or a hub id. Writes results.json and
report.html.
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cocoa_pl.assemble import open_embedder, score
from cocoa_pl.command_line import check_command_line
from cocoa_pl.entry import build, guarded, register_resolvers, set_up_logging
from cocoa_pl.errors import UserError


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    run_dir = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    console = set_up_logging(run_dir)

    def run() -> None:
        embedder = open_embedder(cfg.ckpt, device=cfg.device)
        metrics = Path(cfg.ckpt) / "metrics.csv"
        score(
            embedder,
            build(cfg.benchmark),
            run_dir,
            console,
            checkpoint_name=cfg.ckpt,
            facts={"attention": embedder.policy.name},
            metrics_csv=metrics if metrics.is_file() else None,
        )

    if status := guarded(run):
        sys.exit(status)


def start() -> None:
    if not any(argument.startswith("ckpt=") for argument in sys.argv[1:]):
        raise UserError("say which model to score: python evaluate.py ckpt=RUN_OR_EXPORT")
    check_command_line("evaluate")
    main()


if __name__ == "__main__":
    register_resolvers()
    sys.exit(guarded(start))
