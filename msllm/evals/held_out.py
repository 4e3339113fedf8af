"""Held-out examples of prepared data, for the evaluations in this folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from msllm.config import DataConfig, MixtureConfig
from msllm.data.loader import Loader
from msllm.data.records import read_manifest
from msllm.data.tables import Table, unpack
from msllm.errors import UserError
from msllm.weights.load import LoadedModel


def open_split(model: LoadedModel, data: str = "", split: str = "eval") -> Loader:
    """Opens a split of prepared data for a model.

    The number of rows and the delays of the streams are taken from the data, because parameters do
    not depend on them.

    Args:
      model: a model with a tokenizer.
      data: the prepared directory. Empty: the one that the model was trained on.
      split: the split of the data.

    Raises UserError if there is no such data, or if it does not fit the streams or the tokenizer of
    the model.
    """
    tokenizer = model.require_tokenizer()
    trained = model.run_config.data if model.run_config else DataConfig()
    if trained.mixture.dirs and not data:
        sources = ", ".join(trained.mixture.dirs)
        raise UserError(
            f"the checkpoint was trained on a mixture of {sources}: choose one, --data=DIR"
        )
    folder = data or trained.dir
    if not folder:
        raise UserError(
            "the checkpoint was not trained, so it has no data of its own: prepare data and pass"
            " --data=DIR"
        )
    manifest = read_manifest(folder)
    tables = manifest["splits"][split]["tables"] if split in manifest["splits"] else 0
    config = dataclasses.replace(
        trained,
        dir=folder,
        rows=manifest["rows"],
        batch_size=max(1, min(trained.batch_size, tables)),  # avoids a batch of mostly filler
        mixture=MixtureConfig(),
    )
    delays = tuple(manifest["streams"]["delays"])
    loader = Loader(config, split, dataclasses.replace(model.streams, delays=delays))
    if loader.tokenizer.hash != tokenizer.hash:
        raise UserError(
            f"{folder} was prepared with another tokenizer than the checkpoint's: pass data that"
            " was prepared with the checkpoint's tokenizer, --data=DIR"
        )
    return loader


def examples(loader: Loader) -> Iterator[Table]:
    """The examples of a split, in the order of the data."""
    for step in range(loader.num_batches):
        yield from unpack(loader.batch(step))
