"""Reads the golden cases, and thins them.

`python tests/golden_cases.py FOLDER` copies them from a full set. A full set is large, and its
logits and gradients are redundant: the copy in tests/golden keeps every fourth entry of the
vocabulary and every fourth row of large gradients. Tests thin what they compare in the same way, so
that they run on either. `s5_two_stream` is read from the full set only.
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
    *(
        "s7_c10_block",
        "s7_c10_skip",
        "s7_c1_block",
        "s7_c3_causal",
        "s7_c3_pad",
        "s7_longce",
        "s7_noembed",
    ),
    *("s5_train", "s5_two_stream_offset", "s5_three_stream", "sampler"),
)
STRIDE = 4
LARGE = 16  # rows; gradients of a stream embedding or a norm are smaller


class Case:
    """One golden case: `path`, `meta` (its meta.json) and arrays by name."""

    def __init__(self, path: pathlib.Path):
        self.path, self.name = path, path.name
        self.meta = json.loads((path / "meta.json").read_text())
        self._arrays = np.load(path / "io.npz")
        self.names = [name for name in self._arrays.files if not _dropped(name, self.meta)]
        self._is_copy = path.parent == HERE / "golden"

    def __getitem__(self, name: str) -> np.ndarray:
        whole = self._is_copy or self.name == "sampler"  # its logits are an input
        return self._arrays[name] if whole else thin(name, self._arrays[name])

    def __contains__(self, name: str) -> bool:
        return name in self.names


def thin(name: str, array: np.ndarray) -> np.ndarray:
    """What the copy keeps of an array of this name."""
    if "logits" in name:
        return array[..., ::STRIDE]
    if (
        ("grad." in name or name.startswith("train_final."))
        and array.ndim == 2
        and len(array) > LARGE
    ):
        return array[::STRIDE]
    return array


def shared_folder() -> pathlib.Path:
    """The folder of the full set and of real data: $MSLLM_SHARED, or `shared` beside this clone."""
    return pathlib.Path(os.environ.get("MSLLM_SHARED", HERE.parent.parent / "shared"))


def case(name: str) -> Case:
    """The case, from the copy or the full set; skips the test when it is in neither."""
    for folder in (HERE / "golden", shared_folder() / "golden"):
        if (folder / name / "meta.json").is_file():
            return Case(folder / name)
    pytest.skip(
        f"golden case {name} is not in tests/golden, and $MSLLM_SHARED names no folder with"
        f" golden/{name}"
    )


def _dropped(name: str, meta: dict) -> bool:
    single_head = (
        meta.get("spec", {}).get("heads") == 1
    )  # then the two decoding loops give the same
    return name.startswith(("trace_hidden", "asis_multi", "longce_", "step0_logits")) or (
        single_head and name.startswith("fixed_multi")
    )


def copy_cases(source: pathlib.Path) -> None:
    """Writes tests/golden from a full set."""
    for name in COPIED:
        full, target = Case(source / name), HERE / "golden" / name
        target.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(target / "io.npz", **{array: full[array] for array in full.names})
        for file in ("config.json", "meta.json", "model.safetensors"):
            if (source / name / file).is_file():
                shutil.copyfile(source / name / file, target / file)


if __name__ == "__main__":
    copy_cases(pathlib.Path(sys.argv[1]))
