"""Train a model, or continue a run.

The same command continues the run from its newest checkpoint. Ctrl-C, SIGTERM
or a preemption notice finishes the step, saves and ends the run. On a cluster,
every process runs this command (docs/pods.md).

Exit status: 0 complete, or saved after Ctrl-C; 75 stopped and saved; 76 another
process is gone; 2 bad input; 1 any other failure. After all but 2 the same
command continues the run.
"""

from __future__ import annotations

import argparse
import gc
import time

from msllm.cli.base import Parser, whole

EXAMPLES = """
msllm train --config=configs/quickstart.py --workdir=runs/quickstart
msllm train --config=configs/quickstart.py --workdir=runs/lr --config.optim.lr=1e-3
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_config()
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        required=True,
        help="Directory of the run: checkpoints, metrics, config. All processes share it.",
    )
    parser.add_argument(
        "--coordinator_address",
        metavar="HOST:PORT",
        help="Address of process 0, for clusters that jax does not detect.",
    )
    parser.add_argument(
        "--num_processes",
        metavar="N",
        type=whole(1),
        help="Number of processes. 1: this process alone, also on a cluster.",
    )
    parser.add_argument(
        "--process_id", metavar="N", type=int, help="Number of this process, from 0 on."
    )
    parser.add_argument(
        "--initialization_timeout",
        metavar="SECONDS",
        type=whole(1),
        default=300,
        help="How long to wait for the other processes at the start.",
    )
    parser.add_argument(
        "--heartbeat_timeout",
        metavar="SECONDS",
        type=whole(1),
        default=100,
        help="After this time without a sign of life, a process counts as dead.",
    )


def run(flags: argparse.Namespace) -> int:
    """Trains."""
    # GC is off until the step is compiled (`compiler.finish_startup`). Imports and tracing create
    # no garbage, and collecting would cost a tenth of the start-up time.
    gc.disable()

    import logging

    import jax

    from msllm import training
    from msllm.runtime import processes

    before = (
        time.process_time()
    )  # most of it for imports, so it stands for the time that has passed
    training.open_workdir(flags.workdir)
    processes.connect(
        flags.workdir,
        flags.coordinator_address,
        flags.num_processes,
        flags.process_id,
        flags.initialization_timeout,
        flags.heartbeat_timeout,
    )
    if jax.process_count() > 1:
        logging.basicConfig(format=f"[{jax.process_index()}] %(message)s", force=True)
    with processes.exit_on_error(), processes.StopSignal() as stop:
        state = training.train(flags.config, flags.workdir, stop=stop, seconds_before=before)
        is_complete = int(state.step) >= flags.config.steps
        return 0 if is_complete or stop.interrupted else processes.EXIT_STOPPED
