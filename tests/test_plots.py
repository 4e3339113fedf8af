"""The plots of notebooks show the values of the arrays that they get."""

import numpy as np
import pytest
from scipy.stats import entropy as scipy_entropy

from msllm import metrics
from msllm.config import TokenizerConfig
from msllm.decode.engine import DecodeOptions, Engine
from msllm.errors import UserError
from msllm.streams import make_cells, visibility_table, visible
from msllm.tokenizer import train
from msllm.view import cells, plots
from msllm.view.tables import Columns

pytest.importorskip(
    "matplotlib", reason="matplotlib is not installed (extras `test` and `notebooks`)"
)

from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

NAMES = ("user", "thought", "output")


@pytest.fixture
def axes():
    return Figure().subplots()


def test_a_table_shows_words_silence_and_absent_cells(axes):
    tokenizer = train(["one two three $"], TokenizerConfig(model_type="word", vocab_size=16))
    one, two, silence = *tokenizer.encode("one two"), tokenizer.silence_id
    tokens = np.array([[one, silence, 0], [two, one, silence]])
    present = np.array([[1, 1, 0], [1, 1, 1]], bool)
    shade = np.array([[0.2, np.nan, 1.0], [0.9, 0.4, 0.0]])
    plots.table(axes, Columns(NAMES, (), tokenizer), tokens, present, shade, cell=(1, 0))
    shown = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert shown == {
        (0, 0): ("one", "black"),
        (1, 0): (cells.SILENT, "black"),
        (0, 1): ("two", "white"),
        (1, 1): ("one", "black"),
        (2, 1): (cells.SILENT, "black"),
    }
    image = axes.images[0].get_array()
    np.testing.assert_array_equal(image.mask, ~present)
    np.testing.assert_array_equal(image.data[present], [0.2, 0, 0.9, 0.4, 0])
    assert [label.get_text() for label in axes.get_xticklabels()] == list(NAMES)
    assert axes.images[0].colorbar is None
    # The frame around `cell` at x = 0, y = 1.
    frame = np.array(axes.lines[0].get_data())
    low, high = frame.min(1), frame.max(1)
    assert (low < [0, 1]).all() and (high > [0, 1]).all() and (high - low < 1).all()


def test_shades_have_a_scale_from_0_to_1(axes, letters):
    columns, tokens = Columns(NAMES, (), letters), np.zeros((2, 3), int)
    plots.table(axes, columns, tokens, shade=np.full((2, 3), 0.3), scale="probability")
    scale = axes.images[0].colorbar
    assert scale.ax.get_ylabel() == "probability" and (scale.vmin, scale.vmax) == (0, 1)
    assert scale.cmap is axes.images[0].cmap


def test_visibility_shows_the_predicate(axes):
    lag = np.array([[1, 1, 1], [1, 1, 2], [1 << 30, 1, 1]])
    present = np.ones((1, 4, 3), bool)
    present[0, 0, 2] = False
    segment = (1, 1, 2, 2)
    plots.visibility(axes, visibility_table(make_cells(present, np.array([segment])), lag), NAMES)

    def sees(t, s, u, z):
        """Whether the cell (t, s) sees the cell (u, z)."""
        query = t, s, segment[t], present[0, t, s]
        key = u, z, segment[u], present[0, u, z]
        return visible(*query, *key, lag[s, z])

    table = list(np.ndindex(4, 3))
    expected = [[sees(*query, *key) for key in table] for query in table]
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    legend = axes.get_legend()
    colors = {
        text.get_text(): patch.get_facecolor()
        for text, patch in zip(legend.get_texts(), legend.get_patches())
    }
    image = axes.images[0]
    assert colors == {"sees": image.to_rgba(1), "does not see": image.to_rgba(0)}
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:4] == ["user 0", "thought 0", "output 0", "user 1"]


def test_losses_of_each_stream(axes, tmp_path):
    lines = [
        '{"step": 1, "loss": 3.0, "nll/thought": 3.0, "nll/output": 2.0}',
        '{"step": 2, "nll/thought": 9.0, "nll/output": null}',
        '{"step": 2, "eval/nll/user": 4.0}',
        '{"step": 2, "nll/thought": 2.5, "nll/output": null}',  # repeated after a crash
        '{"step": 3, "nll/th',  # being written
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = metrics.read(tmp_path)
    plots.losses(axes, found, NAMES)
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn) == ["thought, nll", "output, nll"]
    np.testing.assert_array_equal(drawn["thought, nll"].get_data(), [[1, 2], [3.0, 2.5]])
    np.testing.assert_array_equal(drawn["output, nll"].get_data(), [[1, 2], [2.0, np.nan]])
    plots.losses(axes, found, NAMES, "eval/nll")
    assert axes.lines[-1].get_xydata().tolist() == [[2, 4]]
    colors = [to_rgba(line.get_color()) for line in axes.lines]
    assert colors == [to_rgba(f"C{s}") for s in (1, 2, 0)]
    with pytest.raises(UserError, match="'nll_spoken': there are eval/nll, nll"):
        plots.losses(axes, found, NAMES, "nll_spoken")
    with pytest.raises(UserError, match="no metrics in"):
        metrics.read(tmp_path / "none")


def test_shares_of_attention_between_streams(axes):
    shares = np.array([[0.9, 0.1, 0.0], [0.25, 0.5, 0.25], [0.0, 0.7, 0.3]])
    plots.between(axes, shares, NAMES)
    np.testing.assert_array_equal(axes.images[0].get_array(), shares)
    written = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert written == {(s, z): f"{shares[s, z]:.2f}" for s, z in np.ndindex(3, 3)}
    assert axes.get_xlabel() == "attends to"
    assert axes.images[0].colorbar.ax.get_ylabel() == "share of attention"


def test_entropy_is_that_of_the_logits(axes, make_model):
    engine = Engine(make_model(), window=16, all_logits=True, silence_id=1)
    session = engine.open(DecodeOptions(temperature=1.0, seed=3))
    rows = [session.step() for _ in range(4)]
    plots.entropy(axes, rows, NAMES)
    for s, line in enumerate(axes.lines):  # includes inputs, because of all_logits=True
        number, values = line.get_data()
        np.testing.assert_array_equal(number, [0, 1, 2, 3])
        assert np.isnan(values[0])  # nothing predicts the first row
        expected = [scipy_entropy(np.exp(row.logits[s] - row.logits[s].max())) for row in rows[1:]]
        np.testing.assert_allclose(values[1:], expected, atol=1e-5)
    axes.clear()
    # Without all_logits, the entropy of an input is nan, and it has no line.
    no_inputs = [
        row._replace(entropy=np.where([True, False, False], np.nan, row.entropy)) for row in rows
    ]
    plots.entropy(axes, no_inputs, NAMES)
    assert [(line.get_label(), line.get_color()) for line in axes.lines] == [
        ("thought", "C1"),
        ("output", "C2"),
    ]
