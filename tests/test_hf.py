"""Reading and writing Hugging Face folders: exact round trips, and which folders are refused."""

import json

import golden_cases
import hf_models
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msllm.config import ModelConfig, RopeScalingConfig
from msllm.errors import UserError
from msllm.evals.score import score
from msllm.weights import hf, hf_config, hf_tensors
from msllm.weights.load import load

LLAMA3 = RopeScalingConfig("llama3", 8.0, 1.0, 4.0, original_max_position=8192)
SHAPES = {
    "qwen3": {"qk_norm": True},
    "qwen3_streams": {
        "qk_norm": True,
        "streams": 3,
        "stream_embedding": True,
        "tie_embeddings": False,
    },
    "qwen3_unembedded": {"qk_norm": True, "streams": 3},
    "qwen2": {"attention_bias": True},
    "llama": {"tie_embeddings": False, "rope_scaling": LLAMA3},
    "llama_linear": {"rope_scaling": RopeScalingConfig("linear", 4.0), "num_kv_heads": 4},
    "qwen3_yarn": {
        "qk_norm": True,
        "rope_scaling": RopeScalingConfig("yarn", 4.0, beta_slow=2.0, attention_factor=1.5),
    },
}


@pytest.fixture(params=SHAPES)
def model(make_model, request):
    settings = {
        "streams": 1,
        "qk_norm": False,
        "stream_embedding": False,
        "rope_theta": 5e5,
    } | SHAPES[request.param]
    return make_model(**settings)


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_round_trip_is_exact(model, tmp_path):
    hf.write_folder(tmp_path, model.config, model.streams.size, model.parameters)
    config, streams, parameters = hf.read_folder(tmp_path)
    assert config == model.config and streams == model.streams.size
    assert_equal(parameters, jax.tree.map(np.asarray, model.parameters))


@pytest.mark.parametrize("variant", hf_models.VARIANTS)
def test_logits_equal_those_recorded_from_transformers(variant):
    folder = hf_models.RECORDED / variant
    recorded = np.load(folder / "logits.npz")
    model = load(folder)
    ours = score(model, {"tokens": recorded["tokens"][None, :, None]}).logits[0, :, 0]
    np.testing.assert_allclose(ours, recorded["logits"], rtol=0, atol=1e-4)


def test_weights_in_several_files_are_read(model, tmp_path):
    hf.write_folder(tmp_path, model.config, model.streams.size, model.parameters)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    (tmp_path / hf.WEIGHTS).unlink()
    names, places = sorted(tensors), {}
    for part in range(3):
        file = f"model-{part + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[part::3]}, tmp_path / file)
        places |= dict.fromkeys(names[part::3], file)
    (tmp_path / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_equal(hf.read_folder(tmp_path)[2], jax.tree.map(np.asarray, model.parameters))
    (tmp_path / places["model.norm.weight"]).unlink()
    with pytest.raises(UserError, match="there is no file .*-of-00003"):
        hf.read_folder(tmp_path)


def test_linear_weights_are_written_as_outputs_by_inputs(make_model):
    model = make_model(1)
    config, parameters = model.config, model.parameters
    arrays = hf_tensors.to_hf(parameters, config)
    x = np.random.default_rng(0).standard_normal(config.d_model)
    q = np.asarray(parameters["blocks"]["attention"]["q"])[1]
    ours = np.einsum("d,dnh->nh", x, q).reshape(-1)
    np.testing.assert_allclose(
        arrays["model.layers.1.self_attn.q_proj.weight"] @ x, ours, rtol=1e-5, atol=1e-6
    )


def test_rope_parameters_of_newer_configs_are_read():
    """They override a `rope_theta` of the older layout."""
    settings = hf_config.to_hf(ModelConfig(vocab_size=8), 1) | {"rope_theta": 1.0}
    newer = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    config, _ = hf_config.from_hf(settings | {"rope_parameters": newer})
    assert config.rope_theta == 7.0 and config.rope_scaling == RopeScalingConfig("linear", 2.0)


def test_rope_parameters_per_layer_type_are_read():
    settings = hf_config.to_hf(ModelConfig(vocab_size=8), 1) | {"rope_scaling": None}
    by_type = {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 9.0},  # no layer has this type
    }
    config, _ = hf_config.from_hf(settings | {"rope_parameters": by_type})
    assert config.rope_theta == 7.0 and config.rope_scaling == RopeScalingConfig("linear", 2.0)


def test_null_means_the_default():
    settings = hf_config.to_hf(ModelConfig(vocab_size=8), 1)
    optional = ("rms_norm_eps", "rope_theta", "rope_scaling", "num_key_value_heads", "hidden_act")
    without = {key: value for key, value in settings.items() if key not in optional}
    nulls = dict.fromkeys((*optional, "partial_rotary_factor", "attention_bias", "made_up"))
    assert hf_config.from_hf(without | nulls) == hf_config.from_hf(without)


def test_yarn_defaults():
    settings = hf_config.to_hf(ModelConfig(vocab_size=8), 1) | {"max_position_embeddings": 64}
    yarn = {"type": "yarn", "factor": 8.0}

    def read(**rope):
        return hf_config.from_hf(settings | {"rope_scaling": yarn | rope})[0].rope_scaling

    assert read() == RopeScalingConfig("yarn", 8.0, original_max_position=64)
    assert read(original_max_position_embeddings=16).original_max_position == 16
    assert read(attention_factor=None).attention_factor == 0
    numerator, denominator = 0.1 * np.log(8) + 1, 0.05 * np.log(8) + 1
    found = read(mscale=1.0, mscale_all_dim=0.5).attention_factor
    assert np.isclose(found, numerator / denominator)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": "4x"}},
            "factor is '4x': must be a number",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate=false",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "must be positive"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "dynamic scaling changes nothing",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        ({"role_gating_enabled": True}, "role_gating_enabled"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"channel_embedding_method": "concat"}, "'concat'"),
        ({"residual_multiplier": 0.2}, "residual_multiplier is 0.2: this setting is unknown"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "shift": 3}}, "shift is 3"),
        ({"rope_scaling": {"sliding_attention": {"rope_theta": 5.0}}}, "full_attention"),
        ({"rope_scaling": {"full_attention": {}, "rope_theta": 5.0}}, "full_attention"),
        ({"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "has its own code"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
    ids=str,
)
def test_unsupported_settings_are_named(change, message):
    settings = hf_config.to_hf(ModelConfig(vocab_size=8), 3)
    with pytest.raises(UserError, match=message):
        hf_config.from_hf(settings | change)


def test_wrong_tensors_are_named(make_model, tmp_path):
    model = make_model(2)
    hf.write_folder(tmp_path, model.config, 2, model.parameters)
    path = tmp_path / hf.WEIGHTS
    tensors, whole = load_file(path), path.read_bytes()
    norm = "model.layers.1.input_layernorm.weight"

    def refused(changed, message):
        save_file(changed, path)
        with pytest.raises(UserError, match=message):
            hf.read_folder(tmp_path)

    refused({name: x for name, x in tensors.items() if name != norm}, f"missing {norm}")
    refused(tensors | {"model.extra": tensors[norm]}, "unexpected model.extra")
    refused(tensors | {norm: tensors[norm][:-1]}, f"{norm} has shape")
    # Old checkpoints store tables of rotary frequencies, which the reader ignores.
    unused = {hf_tensors.UNUSED[1].format(0): tensors[norm]}
    save_file(tensors | unused, path)
    assert_equal(hf.read_folder(tmp_path)[2], jax.tree.map(np.asarray, model.parameters))
    refused(tensors | {norm: tensors[norm].astype(np.int32)}, f"{norm} has type I32")
    broken = tensors[norm].copy()
    broken[3] = np.inf
    refused(tensors | {norm: broken}, f"{norm} holds 1 numbers that are not finite")
    for damaged in (whole[:-5], whole[:5], b"\xff" * 64, b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            hf.read_folder(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="there is no file"):
        hf.read_folder(tmp_path)


def test_numbers_beyond_the_range_of_a_type_are_refused(tmp_path):
    config, streams, parameters = hf.read_folder(hf_models.RECORDED / "llama")
    parameters["final_norm"][0] = 1e5
    with pytest.raises(
        UserError, match="model.norm.weight has numbers beyond the range of float16"
    ):
        hf.write_folder(tmp_path / "out", config, streams, parameters, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_role_gating_is_refused():
    folder = golden_cases.shared_folder() / "golden" / "s7_gate_layer"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: set MSLLM_SHARED")
    with pytest.raises(UserError, match="role_gating_enabled"):
        hf.read_folder(folder)
