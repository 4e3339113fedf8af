"""Custom hooks: samples during training, a list of checkpoints, and early stopping."""

from collections.abc import Mapping

import jax

import msllm


class Sample(msllm.Hook):
    """Prints a few rows that the model generates, and writes the fraction of silence in them."""

    every = 100

    def at_step(self, run: msllm.Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
        with run.pause("evaluation"):
            model = run.model()
            rows = msllm.generate(model, rows=12).shown[0]  # [12, S]
        run.write({"sample/silence": float((rows == model.tokenizer.silence_id).mean())})
        for stream, name in enumerate(model.streams.names):
            run.say(f"step {step}  {name}: {model.tokenizer.decode(rows[:, stream])}")


class LogCheckpoints(msllm.Hook):
    """Appends the step of each checkpoint to a file."""

    every = 0  # at_step is never called

    def at_save(self, run: msllm.Run, step: int) -> None:
        if jax.process_index() == 0:
            with (run.workdir / "saved.txt").open("a") as file:
                print(step, file=file)


class StopBelow(msllm.Hook):
    """Ends the run when the training loss falls below a limit."""

    def __init__(self, limit: float):
        self._limit, self._loss = limit, None

    def at_step(self, run: msllm.Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
        # The loss of this step is still being computed, but the loss of the last one is ready.
        last, self._loss = self._loss, metrics["loss"]
        if last is not None and float(last) < self._limit:
            run.stop_requested = True
