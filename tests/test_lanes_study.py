"""The study of configs/lanes: what its arms read, its tax, and its small form."""

import pathlib

import jax
import numpy as np
import pytest
from runs import module_of, run_small_study

from msllm.config import from_config_dict
from msllm.data.converters import convert
from msllm.data.converters.lanes import Lanes, lane_streams
from msllm.model.model import init_parameters
from msllm.streams import StreamSpec
from msllm.study import Results, load_results
from msllm.tokenizer import train

STUDY = pathlib.Path(__file__).parents[1] / "configs/lanes/study.py"


@pytest.fixture(scope="module")
def study():
    """The module of the study."""
    return module_of(STUDY)


def make_config(study, name, **dotted):
    """The config of an arm."""
    config = study.get_config()
    config.update_from_flattened_dict(study.get_arms()[name].settings | dotted)
    return from_config_dict(config)


def test_arms_read_the_same_text_with_the_same_parameters(study, tmp_path):
    text = "".join(chr(97 + i * i % 23) + "\n" * (i % 40 == 0) for i in range(6000))
    (tmp_path / "text.txt").write_text(text)
    ids, rows, sizes = {}, {}, {}
    for name, arm in study.get_arms().items():
        config = make_config(study, name, **{"data.path": str(tmp_path / "text.txt")})
        tokenizer = train([text], config.data.tokenizer)
        spec = StreamSpec.from_config(study_streams(config, tokenizer))
        tables = list(convert(config, spec, tokenizer))
        lanes = lane_streams(spec, config.data.options["lanes"])
        shape = Lanes(lanes, spec.delays, tokenizer.silence_id)
        parts = [shape.join(table.tokens) for table in tables]
        assert tokenizer.decode(sum(parts, [])) == text
        length = arm.options["length"]
        # Every piece but the last fills its table.
        assert {len(part) for part in parts[:-1]} == {length}
        assert {len(table.tokens) for table in tables[:-1]} == {config.data.rows}
        assert len(lanes) == arm.options["lanes"]
        assert config.data.batch_size * length == study.CHARACTERS
        ids.setdefault(length, set()).add(tuple(table.example for table in tables))
        rows[name] = config.data.rows
        shapes = jax.eval_shape(lambda c=config, s=spec: init_parameters(c.model, s, 0))
        count = sum(x.size for x in jax.tree.leaves(shapes))
        sizes[name] = count - config.model.d_model * spec.size
        if name.endswith("plan"):
            part = len(parts[0]) // 4
            said = [parts[0][i * part :][: study.PLAN] for i in (1, 2, 3)]
            assert tables[0].tokens[1 : 1 + 3 * study.PLAN, 0].tolist() == sum(said, [])
    assert {length: len(found) for length, found in ids.items()} == {2048: 1, 512: 1}
    assert len(set(sizes.values())) == 1  # but for an embedding for each stream
    assert rows["1, N=2048"] > 3 * max(rows[name] for name in rows if name.startswith("4, N=2048"))


def study_streams(config, tokenizer):
    """The streams of a config, with the ids of its token sets."""
    from msllm.tokenizer import resolve_token_sets

    return resolve_token_sets(config, tokenizer).streams


def test_the_tax_is_found_in_results_that_follow_it(study):
    points, records = [], []
    for name in ("1, N=2048", "2, N=2048", "4, N=2048", "1, N=512", "8, N=512"):
        arm = study.get_arms()[name]
        share = (arm.options["lanes"] - 1) / arm.options["length"]
        for seed in (0, 1):
            points.append(
                {"arm": name, "seed": seed, "step": 1}
                | {"settings": {"data.rows": arm.settings["data.rows"]}, "options": arm.options}
            )
            for i in range(20):
                bits = (20 + i + seed) * (1 + 7 * share)
                item = f"{arm.options['length']}-{i}"
                records.append({"arm": name, "seed": seed, "step": 1, "item": item})
                records[-1] |= {"bits": bits, "bytes": 10.0}
    text = study.report(Results(records, points))
    assert "| 4, N=2048 | 513 | 3.03" in text and "| 1.03 [1.03, 1.03] |" in text
    assert "| 1, N=512 | 513 | " in text and text.endswith("k 7 [7, 7]\n")


@pytest.mark.slow
def test_the_small_study_runs(study, tmp_path):
    path = pathlib.Path(study.get_config().data.path)
    if not path.is_file():
        pytest.skip(f"{path} is missing: set MSLLM_SHARED to the folder with the shared data")
    run_small_study(STUDY, tmp_path)
    found = load_results(tmp_path)
    assert found.arms == ("1, N=512", "4, N=512", "4, N=2048, plan")
    read = {}
    for record in found.records:
        read.setdefault(record["arm"], {})[record["item"]] = record["bytes"]
    assert read["1, N=512"] == read["4, N=512"] == {f"512-{i:04}": 512.0 for i in range(4)}
    assert sum(read["4, N=2048, plan"].values()) == 4 * 2048
    targets = {point["arm"]: point["targets"] for point in found.points}
    assert targets["1, N=512"] == targets["4, N=512"]
    cells = {point["arm"]: point["rows"] for point in found.points}
    assert cells["1, N=512"] > 3 * cells["4, N=512"]
    bits = np.array([r["bits"] / r["bytes"] for r in found.records])
    assert ((bits > 1) & (bits < 12)).all()
    assert "| 4, N=512 | 129 | " in (tmp_path / "table.md").read_text()
