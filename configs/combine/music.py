"""Do parallel copies of part music help more than the same operations in one stream?

    pip install "msllm[music]"
    python configs/combine/part_music.py --out=data/part_music
    msllm study configs/combine/music.py --out=runs/music

The arms and the report are those of study.py. The text is part music for 1 to 6 voices by Bach and
Palestrina: part_music.py describes it and its license. A token is a note, a rest or a time.
MSLLM_PART_MUSIC names another folder than data/part_music.
"""

from __future__ import annotations

import os
import pathlib

import parallel_copies

from msllm.errors import UserError
from msllm.study import Study

VOCABULARY = 70  # about that of the data


def get_config():
    """Returns the settings of one stream."""
    folder = pathlib.Path(os.environ.get("MSLLM_PART_MUSIC") or "data/part_music").absolute()
    config = parallel_copies.get_config()
    config.data.path = str(folder / "train.jsonl")
    config.data.eval_path = str(folder / "held_out.jsonl")
    config.data.tokenizer.model_type = "word"
    return config


def get_study() -> Study:
    """The study."""
    config = get_config()
    if not os.path.isfile(config.data.path):
        raise UserError(
            f"{config.data.path} is missing: write it with `python configs/combine/part_music.py"
            " --out=data/part_music`, or set MSLLM_PART_MUSIC to its folder"
        )
    return parallel_copies.make_study(config, VOCABULARY)
