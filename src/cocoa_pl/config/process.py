"""Exit statuses, logging, and the other processes of a command."""

from __future__ import annotations

import datetime
import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import lightning as L
import rich
import torch
import torch.distributed as dist
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from cocoa_pl.config.build import unresolved
from cocoa_pl.distributed.collectives import is_lost_peer
from cocoa_pl.distributed.processes import (
    INTERRUPTED,
    LOST_PROCESS,
    end_with_parent,
    interruptible,
    is_lost_worker,
)
from cocoa_pl.errors import Interrupted, UserError, first_line, system_error

# One process may be hours behind another; a lost one fails the exchange at once.
PATIENCE = datetime.timedelta(days=30)
MISTAKE = 2  # an exit status, beside `LOST_PROCESS` and `INTERRUPTED`
RESUME = "resume=RUN goes on from the last checkpoint"
# Of a disk or a device, told without a file's name.
OF_DISKS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EMFILE),
)

# Warnings of libraries that ask for nothing.
HARMLESS = (
    "`is_gradient_checkpointing` is deprecated",  # what peft asks of transformers
    ".*isinstance.treespec, LeafSpec.* is deprecated",  # its own use of torch's pytrees
    "The number of training batches .* is smaller than the logging interval",  # a short stage
    "It is recommended to use .*sync_dist=True",  # values are summed over ranks before
    "You're resuming from a checkpoint that ended before",  # the sampler counts steps, not epochs
    "Checkpoint directory .* exists and is not empty",  # last.ckpt is there
    "Image size .* could be decompression bomb",  # twice that size is refused
    "FSDP2-wrapped module .* returned a view tensor",  # nothing writes into the states it returns
)


def guarded(run: Callable[[], int | None], *, remedy: str = RESUME) -> int:
    """Run an entry point; what a user did wrong becomes one sentence and an exit status.

    Args:
        run: what it returns is the status; None is 0.
        remedy: what to do when another process of the job was lost.
    """
    transformers_logging.disable_progress_bar()  # one line for each file it opens
    datasets.disable_progress_bars()  # and so does this
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", message=harmless)
    try:
        for word in sys.argv[1:]:
            if any("\ud800" <= letter <= "\udfff" for letter in word):  # bytes of no letter
                raise UserError(f"{word!r} is not UTF-8; rename the file, or type it otherwise")
        with interruptible():
            status = run() or 0
            for handler in logging.getLogger().handlers:
                handler.flush()  # where a disk took no line, it raises
            sys.stdout.flush()
            return status
    except UserError as error:
        status, said = MISTAKE, f"error: {error}"
    except OmegaConfBaseException as error:  # a value of the config, which is the user's
        status, said = MISTAKE, f"error: {unresolved(error)}"
    except yaml.YAMLError as error:  # it names the file and the line
        status, said = MISTAKE, f"error: {' '.join(str(error).split())}"
    except SafetensorError as error:  # weights that do not fit the disk
        status, said = MISTAKE, f"error: {first_line(error)}"
    except BrokenPipeError:  # of `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        # A folder where a file shall be written, a file where a folder, a full or read-only disk.
        if error.filename is None and error.errno not in OF_DISKS:
            raise
        status, said = MISTAKE, f"error: {system_error(error)}"
        try:
            sys.stdout.flush()
        except OSError:  # it is the one that is full, and Python would try again as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Interrupted, KeyboardInterrupt) as stop:
        if not is_first_process():  # Lightning kills the first at any status but 0
            return INTERRUPTED if started()[0] else 0
        status, said = INTERRUPTED, str(stop) or "interrupted"
    except RuntimeError as error:
        status = LOST_PROCESS
        if is_lost_worker(error):
            said = (
                "error: a data worker was killed, probably because memory ran out; fewer of them "
                f"need less (num_workers=1); {remedy}"
            )
        elif is_lost_peer(error):
            said = (
                "error: another process of this job was killed, or ended with a message of its "
                f"own; {remedy}"
            )
        elif str(error).startswith("Symlink loop"):  # pathlib's, until Python 3.13
            status, said = MISTAKE, f"error: {error}"
        else:
            raise
    sys.stderr.write(f"{said}\n")
    return status


@contextmanager
def launched_processes() -> Iterator[None]:
    """Join the processes that torchrun started, in a job without a trainer; one alone just runs.

    Each gets a GPU of its own where there are any. They exchange nothing but their progress, for
    which gloo is enough.

    Raises:
        UserError: if SLURM started several processes by itself.
    """
    launcher, number = started()
    if launcher == "srun" and number > 1:
        raise UserError(
            "SLURM started several processes, and each of them would do the whole work; "
            "let one task a machine run torchrun, which starts processes that share it"
        )
    if launcher == "torchrun":
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo", timeout=PATIENCE)
    yield
    if launcher == "torchrun":
        dist.barrier()  # all leave together: an exchange with a process that is gone fails
        dist.destroy_process_group()


def is_first_process() -> bool:
    """Of those that train one model together: the one that owns the folder."""
    ranks = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK")
    return not any(int(os.environ.get(name, "0")) for name in ranks)


def started() -> tuple[str | None, int]:
    """What started this process from outside, and how many of them."""
    if TorchElasticEnvironment.detect():
        return "torchrun", int(os.environ["WORLD_SIZE"])
    if SLURMEnvironment.detect():
        return "srun", int(os.environ["SLURM_NTASKS"])
    return None, 1  # Lightning hands the folder to the processes that it starts


def check_processes(trainer: L.Trainer, run_dir: Path) -> None:
    """Refuse a trainer that would wait for processes that nobody starts, and what Lightning reads
    from elsewhere than the config.

    Raises:
        UserError: naming what is there and what to do.
    """
    if found := [name for name in os.environ if name.startswith("PL_TRAINER_")]:
        raise UserError(
            f"{found[0]} is set in the environment, where Lightning looks for what the config does "
            f"not say; unset it and give trainer.{found[0].removeprefix('PL_TRAINER_').lower()}=..."
        )
    if requeued := sorted(run_dir.glob("hpc_ckpt_*.ckpt")):
        raise UserError(
            f"{requeued[0]} is a checkpoint of Lightning's own requeueing, which it would load "
            "into every stage; remove it"
        )
    launcher, number = started()
    devices, nodes = trainer.num_devices, trainer.num_nodes
    if launcher == "srun" and "SLURM_STEP_ID" not in os.environ:
        number = 1  # by the script of a job, whose other tasks nobody starts
    if launcher is None and (nodes == 1 or "NODE_RANK" in os.environ):
        return  # Lightning starts the others
    if number != devices * nodes:
        raise UserError(
            f"trainer.devices x trainer.num_nodes is {devices} x {nodes}, and {number} processes "
            "were started, which would wait for ever or work alone: start as many as the trainer "
            "has, by torchrun or srun, with trainer=ddp or trainer=fsdp (docs/cluster.md)"
        )


def end_with_launcher() -> None:
    """A process that Lightning started on this machine ends when the one that started it is killed.

    Otherwise it would wait for that one until an exchange times out. torchrun and SLURM see to it
    themselves.
    """
    if not started()[0] and int(os.environ.get("LOCAL_RANK", "0")):
        end_with_parent(message=f"error: the first process of this job was killed; {RESUME}\n")


def set_up_logging(run_dir: Path) -> Console:
    """Log lines to the console that progress bars use, and with times to the run's `log.txt`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rich.reconfigure(width=None if sys.stdout.isatty() else 160)
    console = rich.get_console()  # of progress bars, too
    screen: logging.Handler = (
        RichHandler(console=console, show_path=False, show_time=False, show_level=False)
        if console.is_terminal
        else logging.StreamHandler(sys.stdout)
    )
    screen.setFormatter(logging.Formatter("%(message)s"))
    file = logging.FileHandler(run_dir / "log.txt")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = logging.INFO if is_first_process() else logging.WARNING  # it logs for all
    logging.basicConfig(level=level, handlers=[screen, file], force=True)
    logging.raiseExceptions = False  # a full disk takes no line: `guarded` says so, once
    for chatty in ("lightning.pytorch", "lightning.fabric", "httpx", "huggingface_hub", "mteb"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Its one line is that it ends the job because one of the processes has died.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(
        logging.INFO
    )
    return console
