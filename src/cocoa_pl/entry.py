"""Command line and YAML in, plain objects out: what `train.py` and `evaluate.py` share.

Nothing behind this module knows Hydra or OmegaConf.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import torch.distributed as dist
import yaml
from hydra._internal.utils import _locate
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler
from transformers.utils import logging as transformers_logging

from cocoa_pl.bounds import Count, NotNegative, Positive, Seed, ShareAboveZero, Whole, check_value
from cocoa_pl.data.rows import OnBadRow
from cocoa_pl.distributed.collectives import is_lost_peer
from cocoa_pl.errors import UserError, first_line
from cocoa_pl.stages.recipe import Interrupted

# One process may be hours behind another; one that is gone is noticed at once.
PATIENCE = datetime.timedelta(days=30)
MISTAKE, LOST_PEER, INTERRUPTED = 2, 3, 130  # exit statuses
LAUNCHER_CHECK_SECONDS = 2.0
RESUMABLE = ("trainer.", "logger", "num_workers", "checkpoint_every", "evaluate", "init_from")

# What Lightning warns of although nobody can or should do anything about it.
HARMLESS = (
    ".*isinstance.treespec, LeafSpec.* is deprecated",  # its own use of torch's pytrees
    "The number of training batches .* is smaller than the logging interval",  # a short stage
    "It is recommended to use .*sync_dist=True",  # values are summed over ranks before
    "You're resuming from a checkpoint that ended before",  # the sampler counts steps, not epochs
    "FSDP2-wrapped module .* returned a view tensor",  # nothing writes into the states it returns
)

# What the keys may be that are no parameters of anything that a config makes.
VALUES: dict[str, Any] = {
    "seed": Seed,
    "num_workers": Whole,
    "checkpoint_every": Count,
    "evaluate": bool,
    **{"trainer.log_every_n_steps": Count, "trainer.num_nodes": Count},
    "on_bad_row": OnBadRow,
    "model.dtype": Literal["float32", "bfloat16"],
    "model.gradient_checkpointing": bool,
    "model.max_length": Count,
    **dict.fromkeys(("model.min_pixels", "model.max_pixels", "model.eval_max_pixels"), Count),
    **{"batch_tokens": Count, "threads": Whole},  # of evaluate and mine
    **{"negatives": Count, "max_of_positive": ShareAboveZero, "keep": bool},  # of mine
    "workers": Whole | None,  # of doctor
    **{"gpus": Count | None, "mfu": ShareAboveZero, "lengths.rows": Count | None},  # of plan
    "lengths.image_tokens": Count | None,
    **{f"lengths.{of}": NotNegative for of in ("text", "negatives", "row_bytes", "image_kib")},
    **{f"lengths.images_per_{of}": NotNegative for of in ("query", "positive")},
    **{"assume.context_gib": NotNegative, "assume.slack": NotNegative},
    **{"hardware.memory_gib": Positive, "hardware.tflops": Mapping[str, Positive]},
}

log = logging.getLogger(__name__)


def register_resolvers() -> None:
    """`${run_dir:RESUMED,NEW}` is the run folder, resumed or new; `${sum:A,B}` adds step counts."""
    OmegaConf.register_new_resolver("run_dir", lambda resumed, new: resumed or new, replace=True)
    OmegaConf.register_new_resolver("sum", lambda *terms: sum(terms), replace=True)


def guarded(
    run: Callable[[], None], *, remedy: str = "resume=RUN goes on from the last checkpoint"
) -> int:
    """Run an entry point; what a user did wrong becomes one sentence and an exit status.

    Args:
        remedy: what to do when another process of the job was lost.
    """
    transformers_logging.disable_progress_bar()  # one line for each file it opens
    try:
        run()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    except OmegaConfBaseException as error:  # a value of the config, which is the user's
        sys.stderr.write(f"error: {first_line(error)}\n")
        return MISTAKE
    except (Interrupted, KeyboardInterrupt) as stop:
        sys.stderr.write(f"{str(stop) or 'interrupted'}\n")
        return INTERRUPTED
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        sys.stderr.write(
            "error: another process of this job was killed, or ended with a message of its own; "
            f"{remedy}\n"
        )
        return LOST_PEER
    return 0


@contextmanager
def launched_processes() -> Iterator[None]:
    """Join the processes that torchrun started, in a job without a trainer; one alone just runs.

    Each gets a GPU of its own where there are any. They only tell each other how far they are,
    which gloo does with GPUs too.

    Raises:
        UserError: if SLURM started several processes by itself.
    """
    if not TorchElasticEnvironment.detect():
        if SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1:
            raise UserError(
                "SLURM started several processes, and each of them would do the whole work; "
                "let one task a machine run torchrun, which starts processes that share it"
            )
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=PATIENCE)
    yield
    dist.barrier()  # nobody leaves while another still waits for him
    dist.destroy_process_group()


def end_with_launcher() -> None:
    """A process that Lightning started on this machine ends when the one that started it is killed.

    Otherwise it would wait for that one until an exchange times out. torchrun and SLURM see to it
    themselves.
    """
    outside = SLURMEnvironment.detect() or TorchElasticEnvironment.detect()
    if outside or int(os.environ.get("LOCAL_RANK", "0")) == 0:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LAUNCHER_CHECK_SECONDS)
        sys.stderr.write(
            "error: the first process of this job was killed; "
            "resume=RUN goes on from the last checkpoint\n"
        )
        os._exit(LOST_PEER)

    threading.Thread(target=watch, daemon=True).start()


def set_up_logging(run_dir: Path) -> Console:
    """Log lines to the console that progress bars use, and with times to the run's `log.txt`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    screen: logging.Handler = (
        RichHandler(console=console, show_path=False, show_time=False, show_level=False)
        if console.is_terminal
        else logging.StreamHandler(sys.stdout)
    )
    screen.setFormatter(logging.Formatter("%(message)s"))
    file = logging.FileHandler(run_dir / "log.txt")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    is_first: bool = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    level = logging.INFO if is_first else logging.WARNING  # of several processes one talks
    logging.basicConfig(level=level, handlers=[screen, file], force=True)
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", message=harmless)
    for chatty in ("lightning.pytorch", "lightning.fabric", "httpx", "huggingface_hub", "mteb"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Its one line is that it ends the job because one of the processes has died.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(
        logging.INFO
    )
    return console


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of the run to resume, with the few keys that may change.

    Raises:
        UserError: if there is no such run, or a key is given that would make it another run.
    """
    saved = Path(cfg.resume) / "config.yaml"
    if not saved.is_file():
        raise UserError(f"resume={cfg.resume}: there is no run (no config.yaml) in that folder")
    resumed = load_config(saved)
    changed = [o for o in overrides if not o.startswith("resume=")]
    if wrong := [o for o in changed if not o.startswith(RESUMABLE)]:
        raise UserError(f"a resumed run keeps its config; {wrong[0]} cannot be changed")
    for override in changed:
        key = override.split("=", 1)[0]
        OmegaConf.update(resumed, key, OmegaConf.select(cfg, key))
    with open_dict(resumed):
        resumed.resume = cfg.resume
    return resumed


def load_config(path: Path) -> DictConfig:
    """What `save_config` wrote.

    Raises:
        UserError: if it is damaged.
    """
    try:
        cfg = OmegaConf.load(path)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{path} is no configuration of a run")
    return cfg


def check_values(node: DictConfig) -> None:
    """Refuse numbers, bools and choices that keys, or parameters of what the config makes, are not
    declared for, before anything is made.

    Raises:
        UserError: naming the key as a user would type it.
    """
    root, where = node._get_root(), node._get_full_key(None)
    plain = OmegaConf.to_container(root, resolve=False)
    for key, kind in declared(plain, where).items():
        if _raw(plain, key) == MISSING:
            continue
        try:
            value = OmegaConf.select(root, key)
            if OmegaConf.is_dict(value) and "_target_" in value:
                continue  # it has values of its own
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException:  # told where it is needed
            continue
        check_value(_typed(plain, key), value, kind)
    for most in ("model.max_pixels", "model.eval_max_pixels"):
        if not where and "model" in node and OmegaConf.select(node, most) < node.model.min_pixels:
            least = node.model.min_pixels
            raise UserError(f"{most} must be at least model.min_pixels={least}")


def declared(plain: Any, where: str = "") -> dict[str, Any]:
    """Keys of a plain config, below one of them, and the annotations of what they are for."""
    found = {} if where else dict(VALUES)
    for key, target in _targets(_raw(plain, where) if where else plain, where):
        found |= {f"{key}.{name}": kind for name, kind in _parameters(target).items()}
    return found


def _targets(plain: Any, where: str) -> Iterator[tuple[str, str]]:
    """Places below one that make something, and what makes it."""
    if not isinstance(plain, dict):
        return
    if "_target_" in plain:
        yield where, plain["_target_"]
    for key, value in plain.items():
        if key != "hydra" or where:
            yield from _targets(value, f"{where}.{key}" if where else key)


@lru_cache
def _parameters(target: str) -> dict[str, Any]:
    """Annotations of a callable's parameters; none if it is not there, which `build` will tell, or
    if they name what is imported for type checkers alone.
    """
    try:
        made: Any = _locate(target)
        if isinstance(made, type):
            made = made.__init__  # type: ignore[misc]
        return get_type_hints(made, include_extras=True)
    except (ImportError, AttributeError, ValueError, NameError):
        return {}


def _raw(plain: Any, key: str) -> Any:
    """What stands in a config, not resolved; `???` where nothing does."""
    for part in key.split("."):
        plain = plain.get(part, MISSING) if isinstance(plain, dict) else MISSING
    return plain


def _typed(plain: Any, key: str) -> str:
    """The key that a value comes from through interpolations."""
    while elsewhere := re.fullmatch(r"\$\{(\w[\w.]*)\}", str(_raw(plain, key))):
        key = elsewhere[1]
    return key


def build(node: Any, **extra: Any) -> Any:
    """Instantiate a config node; lists and dicts arrive as plain Python.

    Raises:
        UserError: what a constructor says about a value that the user chose.
    """
    if isinstance(node, DictConfig):
        check_values(node)
    try:
        return instantiate(node, _convert_="all", **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):  # UserError is one
            raise UserError(str(error.__cause__)) from error
        if str(error).startswith("Error locating target"):
            told = first_line(error).partition(",")[0]
            raise UserError(f"{told}; it must be importable (PYTHONPATH)") from error
        raise
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} has no value; give it as {error.full_key}=..."
        ) from error
