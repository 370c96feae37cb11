"""Pretrain Geneformer: `torchrun --nproc_per_node=N train.py [--config-name NAME] [KEY=VALUE ...]`.

Configurations are in hydra_config/; `--cfg job` shows the composed one, `--help` lists the choices.
"""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import hydra
import torch.distributed as dist

from geneformer_pretrain.config.compose import CONFIG_DIR, DEFAULT_NAME, load_config, read_command_line
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.console import TolerantStream
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.distributed.rendezvous import exit_with_error
from geneformer_pretrain.distributed.world import World, distributed_world
from geneformer_pretrain.errors import ConfigError, explain, name_error
from geneformer_pretrain.model.memory import remedies
from geneformer_pretrain.run.curves import draw_at_end
from geneformer_pretrain.run.folder import is_not_empty, lock_run_folder, write_exit, write_failed_start
from geneformer_pretrain.run.signals import EXIT_CODE_SIGNAL, exit_without_teardown
from geneformer_pretrain.training.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `train.py` and leave with its exit code: 0 complete, 75 stopped by a signal, 1 error."""
    logging.basicConfig(format="%(levelname)s %(message)s", stream=TolerantStream(2), force=True)
    code: str | int | None
    try:
        code = train(list(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as ending:
        code = ending.code
    except KeyboardInterrupt:
        code = "Interrupted."
    exit_without_teardown(code)


def train(arguments: Sequence[str]) -> int:
    """Compose the configuration of a command line and train; return the exit code.

    Raises
    ------
    SystemExit
        With code 1 after an error of the user's or of the system, which is printed as one line.
    """
    config: Config | None = None
    mistake = ""
    try:
        given = read_command_line(arguments)
        if given.shows:
            show(given.ordered)
            return 0
        name = given.config_name or DEFAULT_NAME
        config = load_config(name, given.overrides, config_path=given.config_path, config_dir=given.config_dir)
    except (ConfigError, OSError) as error:
        mistake = explain(error) or ""
        for argument in arguments:  # A job script would take an earlier run's exit.json there for the outcome.
            key, _, folder = argument.partition("=")
            if key == "training.checkpoint_dir":
                write_failed_start(Path(os.path.expanduser(folder)), error)
    try:
        return run(config, mistake)
    except Exception as error:
        if explain(error) is None:
            raise
        exit_with_error(error, smaller=() if config is None else (*remedies(config), "a smaller model"))


def run(config: Config | None, mistake: str = "") -> int:
    """Train; return the exit code.

    Parameters
    ----------
    config
        Checked configuration.
    mistake
        The reason why this rank has no configuration, if any: all ranks raise it.
    """
    folder = None if config is None else Path(config.training.checkpoint_dir)
    # The watchdog comes before the time limit of collectives, which cannot name the rank that they wait for.
    timeout = timedelta(minutes=10, seconds=0 if config is None else config.training.hang_timeout_seconds)
    with ExitStack() as stack:
        try:
            world = stack.enter_context(distributed_world(timeout, mistake=mistake))
            assert config is not None
            assert folder is not None
            earlier_exit = stack.enter_context(lock_run_folder(folder, Ranks(timedelta(minutes=10))))
        except Exception as error:
            if folder is not None:
                write_failed_start(folder, error)
            raise
        return _train(config, world, folder, earlier_exit)


def _train(config: Config, world: World, folder: Path, earlier_exit: bytes | None) -> int:
    trainer: Trainer | None = None
    code = 1
    try:
        trainer = Trainer(config, world, earlier_exit)
        reason, code = ("completed", 0) if trainer.fit() else ("signal", EXIT_CODE_SIGNAL)
        if world.is_main:
            write_exit(folder, reason, code, **trainer.progress.outcome())
            if code == 0:
                draw_at_end(folder)
        # torchrun ends all other ranks as soon as one has left with a code other than 0.
        dist.barrier()
    except BaseException as error:
        # A mistake in the first start leaves no folder behind; Ctrl-C outside of the steps is no error.
        if not isinstance(error, KeyboardInterrupt) and (trainer is not None or is_not_empty(folder)):
            write_exit(folder, "error", 1, rank=world.rank, error=name_error(error))
        if trainer is not None and isinstance(error, Exception):
            with suppress(Exception):  # A save under way is worth finishing; the error comes first.
                trainer.store.wait()
        raise
    finally:
        if trainer is not None and trainer.logs is not None:
            trainer.logs.close()
            trainer.logs.close_trackers(code)
    return code


def show(arguments: Sequence[str]) -> None:
    """Let Hydra print help, or a composed configuration; nothing is run."""
    sys.argv[1:] = arguments
    hydra.main(config_path=str(CONFIG_DIR), config_name=DEFAULT_NAME, version_base="1.3")(lambda composed: None)()
