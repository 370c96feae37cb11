"""Pretrain Geneformer: `torchrun --nproc_per_node=N train.py [--config-name NAME] [KEY=VALUE ...]`.

Configurations lie in hydra_config/; `--cfg job` shows the composed one, `--help` lists the choices.
"""

import logging
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import hydra
import torch.distributed as dist
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from geneformer_pretrain.config.overrides import read_overrides, without_plus
from geneformer_pretrain.config.schema import Config, check_names, resolve
from geneformer_pretrain.distributed.agreement import naming_lost_connections
from geneformer_pretrain.distributed.rendezvous import end, telling_all_ranks
from geneformer_pretrain.distributed.world import distributed_world
from geneformer_pretrain.errors import CheckpointError, ConfigError, TrainingError, require
from geneformer_pretrain.model.memory import explaining_lack_of_memory
from geneformer_pretrain.run.folder import hold_folder, is_used, telling_of_failed_start
from geneformer_pretrain.run.signals import EXIT_CODE_SIGNAL, leave, write_exit
from geneformer_pretrain.training.trainer import Trainer


def run(config: Config) -> int:
    """Train; return the exit code."""
    folder = Path(config.training.checkpoint_dir)
    # The watchdog comes before the time limit of collectives, which cannot tell whom they wait for.
    timeout_minutes = 10 + config.training.hang_timeout_seconds / 60
    with ExitStack() as stack:
        with telling_of_failed_start(config.training.checkpoint_dir), naming_lost_connections():
            world = stack.enter_context(distributed_world(timeout_minutes))
            stack.enter_context(hold_folder(folder))
        trainer: Trainer | None = None
        try:
            with naming_lost_connections(), explaining_lack_of_memory(config):
                trainer = Trainer(config, world)
                reason, code = ("completed", 0) if trainer.fit() else ("signal", EXIT_CODE_SIGNAL)
                if world.is_main:
                    write_exit(folder, reason, code, step=trainer.progress.step)
                # torchrun ends all other ranks as soon as one has left with a code other than 0.
                dist.barrier()
        except BaseException as error:
            # A mistake in the first start leaves no folder behind; Ctrl-C outside of the steps is no error.
            if not isinstance(error, KeyboardInterrupt) and (trainer is not None or is_used(folder)):
                write_exit(folder, "error", 1, rank=world.rank, error=f"{type(error).__name__}: {error}")
            if trainer is not None and isinstance(error, Exception):
                with suppress(Exception):  # A save under way is worth finishing; the error is what to tell of.
                    trainer.store.wait()
            raise
    return code


@hydra.main(config_path="hydra_config", config_name="l0_sanity", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Check the composed configuration and train; errors of the user's are one plain message."""
    logging.basicConfig(format="%(levelname)s %(message)s", force=True)
    try:
        folder = OmegaConf.select(composed, "training.checkpoint_dir", throw_on_resolution_failure=False)
        with telling_of_failed_start(None if folder is None else str(folder)), telling_all_ranks():
            config = resolve(composed)
        code = run(config)
    except (ConfigError, CheckpointError, TrainingError, OSError, MemoryError) as error:
        end(error)
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
    sys.exit(code)


def check_arguments(arguments: list[str]) -> list[str]:
    """Refuse what Hydra would have no advice on, or do although it makes no sense here.

    Returns
    -------
    The arguments in an order that Hydra's parser understands: it does not take options between overrides.

    Raises
    ------
    ConfigError
        On every rank, if any has such arguments.
    """
    given = get_args_parser().parse_intermixed_args(arguments)
    with telling_all_ranks():
        require(
            not given.multirun,
            "--multirun is not supported; start one run a command, each with its own checkpoint_dir.",
        )
        require(
            not given.resolve or bool(given.cfg or given.help),
            "--resolve goes with --cfg job or --help; a run always resolves its configuration.",
        )
        for option, given_folder, base in (
            ("--config-dir", given.config_dir, Path()),
            ("--config-path", given.config_path, Path(__file__).parent),
        ):
            if given_folder and "://" not in given_folder:
                require((base / given_folder).is_dir(), f"{option}: no folder {base / given_folder}; correct the path.")
        if given.config_dir or given.config_path:  # Other configurations may be there, and keys for them to use.
            read_overrides(given.overrides)
        else:
            check_names(given.config_name or "l0_sanity", given.overrides)
    taken = {id(override) for override in given.overrides}  # An option may have a value that reads the same.
    overrides = [without_plus(override) for override in given.overrides]
    return overrides + [argument for argument in arguments if id(argument) not in taken and argument != "--"]


if __name__ == "__main__":
    try:
        try:
            sys.argv[1:] = check_arguments(sys.argv[1:])
        except (ConfigError, OSError) as mistake:
            end(mistake)
        main()
    except SystemExit as ending:
        leave(ending.code)
