"""A custom metrics writer: the losses of a run as a CSV file."""

from collections.abc import Mapping

from etils import epath

from msllm.config import Config
from msllm.metrics import append_lines


class LossCsv:
    """Writes `losses.csv`: step, training loss, held-out loss."""

    def __init__(self, workdir: epath.Path, config: Config):
        self._file = append_lines(workdir / "losses.csv")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        losses = values.get("loss", ""), values.get("eval/loss", "")
        if any(loss != "" for loss in losses):
            print(step, *losses, sep=",", file=self._file, flush=True)

    def close(self) -> None:
        self._file.close()
