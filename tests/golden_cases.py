"""Reads the golden cases: inputs and results of the reference implementation.

The full set is large, and its logits and gradients are redundant. The copy in tests/golden keeps
every fourth vocabulary entry of the logits and every fourth row of large gradients. Tests thin
their own results in the same way, so they run on the copy and on the full set. The case
`s5_two_stream` is in the full set only.

`python tests/golden_cases.py FOLDER` writes the copy from the full set in FOLDER.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
COPIED = (
    "s7_c10_block",
    "s7_c10_skip",
    "s7_c1_block",
    "s7_c3_causal",
    "s7_c3_pad",
    "s7_longce",
    "s7_noembed",
    "s5_train",
    "s5_two_stream_offset",
    "s5_three_stream",
    "sampler",
)
STRIDE = 4
LARGE = 16  # rows; the gradients of stream embeddings and norms have fewer and are kept


class Case:
    """One golden case: `case[name]` is an array.

    Attributes:
      path: the case's folder.
      name: the folder's name.
      meta: the content of meta.json.
      names: the names of the arrays.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.name = path, path.name
        self.meta = json.loads((path / "meta.json").read_text())
        self._arrays = np.load(path / "io.npz")
        self.names = [name for name in self._arrays.files if not _dropped(name, self.meta)]
        self._is_copy = path.parent == HERE / "golden"

    def __getitem__(self, name: str) -> np.ndarray:
        # A copy is thinned already, and the sampler's logits are an input.
        keep = self._is_copy or self.name == "sampler"
        return self._arrays[name] if keep else thin(name, self._arrays[name])

    def __contains__(self, name: str) -> bool:
        return name in self.names


def thin(name: str, array: np.ndarray) -> np.ndarray:
    """The part of an array of this name that the copy keeps."""
    if "logits" in name:
        return array[..., ::STRIDE]
    is_weight = "grad." in name or name.startswith("train_final.")
    if is_weight and array.ndim == 2 and len(array) > LARGE:
        return array[::STRIDE]
    return array


def shared_folder() -> pathlib.Path:
    """The folder of the full set and of data: $MSLLM_SHARED, or `shared` beside the repository."""
    return pathlib.Path(os.environ.get("MSLLM_SHARED", HERE.parent.parent / "shared"))


def case(name: str) -> Case:
    """Reads the case from the copy or the full set; skips the test if neither has it."""
    for folder in (HERE / "golden", shared_folder() / "golden"):
        if (folder / name / "meta.json").is_file():
            return Case(folder / name)
    pytest.skip(
        f"golden case {name} is not in tests/golden, and $MSLLM_SHARED names no folder with"
        f" golden/{name}"
    )


def _dropped(name: str, meta: dict) -> bool:
    """Whether no test reads the array."""
    dropped = ("trace_hidden", "asis_multi", "longce_", "step0_logits")
    if meta.get("spec", {}).get("heads") == 1:
        dropped += ("fixed_multi",)  # with one head, both decoding loops give the same
    return name.startswith(dropped)


def copy_cases(source: pathlib.Path) -> None:
    """Writes tests/golden from the full set in `source`."""
    for name in COPIED:
        full, target = Case(source / name), HERE / "golden" / name
        target.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(target / "io.npz", **{array: full[array] for array in full.names})
        for file in ("config.json", "meta.json", "model.safetensors"):
            if (source / name / file).is_file():
                shutil.copyfile(source / name / file, target / file)


if __name__ == "__main__":
    copy_cases(pathlib.Path(sys.argv[1]))
