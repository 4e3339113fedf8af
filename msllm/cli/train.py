"""Train a model, or continue a run.

Run the same command again to continue from the newest checkpoint. On Ctrl-C,
SIGTERM or a preemption notice, the run finishes its step, saves a checkpoint
and exits. On a cluster, start this command in every process (docs/pods.md).

Exit status:

0   training is complete, or Ctrl-C stopped it and it was saved
75  SIGTERM or a preemption notice stopped it, and it was saved
76  another process failed or did not start
2   bad input; the same command fails again
1   any other failure
"""

from __future__ import annotations

import argparse
import gc
import time

from msllm.cli.base import Parser, non_negative_int, positive_int

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
        help="Directory for checkpoints, metrics and the config. All processes must share it.",
    )
    parser.add_argument(
        "--coordinator_address",
        metavar="HOST:PORT",
        help="Address of process 0. Default: jax detects the cluster, if there is one.",
    )
    parser.add_argument(
        "--num_processes",
        metavar="N",
        type=positive_int,
        help="Number of processes. 1 trains in this process alone, even on a cluster. Default: "
        "as jax detects.",
    )
    parser.add_argument(
        "--process_id",
        metavar="N",
        type=non_negative_int,
        help="Index of this process, from 0. Default: as jax detects.",
    )
    parser.add_argument(
        "--initialization_timeout",
        metavar="SECONDS",
        type=positive_int,
        default=300,
        help="How long to wait at the start until all processes have joined.",
    )
    parser.add_argument(
        "--heartbeat_timeout",
        metavar="SECONDS",
        type=positive_int,
        default=100,
        help="How long a process may be silent before the others treat it as dead and exit.",
    )


def run(flags: argparse.Namespace) -> int:
    """Trains the model and returns the exit status."""
    # Disable GC until the step is compiled (`compiler.finish_startup`): nothing that imports and
    # tracing allocate is garbage, and collecting takes about 10 % of the start-up time.
    gc.disable()

    import logging

    import jax

    from msllm import training
    from msllm.runtime import processes

    # CPU time approximates the wall time since the start: so far the process has run imports.
    seconds_before = time.process_time()
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
        state = training.train(
            flags.config, flags.workdir, stop=stop, seconds_before=seconds_before
        )
        is_complete = int(state.step) >= flags.config.steps
        return 0 if is_complete or stop.interrupted else processes.EXIT_STOPPED
