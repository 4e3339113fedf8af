"""docs/extending/converter.md: a converter from outside the package."""

import pathlib
import re
import sys

import pytest
from test_data_docs import draw

from msllm.config import from_config_dict
from msllm.data.loader import Loader
from msllm.data.prepare import prepare
from msllm.data.tables import example_hash, unpack
from msllm.errors import UserError
from msllm.streams import StreamSpec

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending/converter.md").read_text()
CODE, CONFIG = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
(RECORDS,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.S)
(DRAWN,) = re.findall(r"```\nrow .*?\n(.*?)```", PAGE, flags=re.S)


def page_settings():
    """The settings that the page's config file makes."""
    module = {}
    exec(CONFIG, module)
    return module["get_config"]()


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The page's config with `outside.converter` in tests/, in a folder with the page's input."""
    (tmp_path / "echo.jsonl").write_text(RECORDS)
    monkeypatch.chdir(tmp_path)
    settings = page_settings()
    settings.data.converter = "outside.converter:convert"
    return from_config_dict(settings)


def test_the_page_shows_the_tested_module():
    assert (ROOT / "tests/outside/converter.py").read_text() == CODE


@pytest.mark.parametrize("processes", [1, 2])
def test_the_page_draws_the_prepared_table(config, processes, capsys, monkeypatch):
    if processes == 2:  # cut the input into two portions
        monkeypatch.setattr("msllm.data.sources.PORTION_BYTES", 40)
    manifest = prepare(config, config.data.dir, processes)
    assert len(manifest["splits"]["train"]["shards"]) == processes
    assert manifest["settings"]["converter_code"]
    loader = Loader(config.data, "train", StreamSpec.from_config(config.streams))
    rows = range(loader.num_tables)
    tables = {
        table.example: draw(table, config.streams.names, loader.tokenizer)
        for table in unpack(loader.batch(0, rows), loader.example_ids(0, rows))
    }
    drawn = {line.split()[0]: line.split()[1:] for line in DRAWN.splitlines()}
    assert len(tables) == 2 and tables[example_hash("the door is open")] == drawn
    assert prepare(config, config.data.dir, processes) == manifest
    assert "already holds this data" in capsys.readouterr().out


def test_bad_records_of_a_users_converter_are_reported(config):
    path = pathlib.Path(config.data.path)
    path.write_text(path.read_text() + '{"text": ""}\n')
    with pytest.raises(UserError, match="echo.jsonl:3: the text is empty"):
        prepare(config, config.data.dir)


def test_the_page_works_as_written(config, tmp_path, monkeypatch):
    """Prepares data with the module `echo` of the page in a folder on the Python path."""
    (tmp_path / "echo.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "echo", raising=False)
    page = from_config_dict(page_settings())
    assert page.data.converter == "echo:convert"
    splits = prepare(page, "data/page")["splits"]
    assert splits == prepare(config, config.data.dir)["splits"]
