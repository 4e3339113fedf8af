"""Does it protect a model from injected instructions if roles have streams of their own?

    msllm study configs/roles/study.py --out=runs/roles

Every arm learns the same tasks from the same texts: the system asks for an action and a part of the
data ("please send the first three words"). Training is benign. The measurement injects other
instructions into the data, in the forms of StruQ (arXiv 2402.06363), and counts how often the model
obeys them. As many ordinary words in the same place (sham) show what coincidence gives.

Arms:

- `delimiters`: one stream; reserved control pieces set the roles apart.
- `role vectors`: the streams system, data and output, one after the other. This is the same
  computation as one stream with a role embedding (ISE, arXiv 2410.09102); tests/test_roles.py
  compares the two.
- `rotation`: one after the other; the embeddings of the data are rotated by 90 degrees in place of
  role vectors (ASIDE, arXiv 2503.10566).
- `streams`: side by side, so that the rows of system and data overlap.
- `streams, system blind`: side by side, and the system never sees the data.
- `plan and door`: a plan sees only the system and names the action and the part. The output sees
  the data and the tokens of the plan, and never the system. `msllm flow` shows the certificate.
- `plan, latent`: the same streams with latent edges everywhere.
- `..., first`: the instruction always comes first, as in most benchmarks.

Data: data/translation_tatoeba and data/dialogue_taskmaster4 in the folder that MSLLM_SHARED names
(default: `shared` beside the repository).
Cost: 0.8 M parameters. Figures: docs/security.md.
"""

from __future__ import annotations

from msllm.config import default_config
from msllm.data.files import shared_file

TATOEBA = "data/translation_tatoeba/eng-swe.txt"
RESERVED = ("<part>", "<system>", "<data>", "<plan>", "<output>")
# With these the steps of all arms hold the same number of examples.
TABLES = {"serial": 20, "beside": 13, "plan": 13}

_MARKS = {"system": "<system>", "data": "<data>", "action": "<output>"}
ONE = {
    "data.options": {
        "roles": {
            "system": "text",
            "data": "text",
            "action": "text",
            "output": "text",
            "plan": None,
        },
        "said": ("action", "output"),
        "marks": _MARKS,
    }
}
SERIAL = {
    "streams.names": ("system", "data", "output"),
    "streams.kinds": ("input", "input", "output"),
    "streams.skip_silence": True,
    "data.options": {"roles": {"action": "output", "plan": None}, "marks": _MARKS},
}
BESIDE = SERIAL | {
    "data.options": SERIAL["data.options"] | {"beside": ("data",)},
    "data.batch_size": TABLES["beside"],
}
PLAN = {
    "streams.names": ("system", "data", "plan", "output"),
    "streams.kinds": ("input", "input", "thought", "output"),
    "streams.skip_silence": True,
    "data.options": {
        "roles": {"action": None},
        "marks": {"system": "<system>", "data": "<data>", "plan": "<plan>", "output": "<output>"},
        "beside": ("data",),
        "rows": {"plan": 3},  # the mark, the action and the part
    },
    "data.batch_size": TABLES["plan"],
}
DOOR = PLAN | {
    "streams.visibility": "isolated",
    "streams.lags": (
        ("plan", "system", "1"),
        ("output", "data", "1"),
        ("output", "plan", "1 tokens"),
    ),
}
FIRST = {"data.format": "role_tasks:first"}

ARMS = {
    "delimiters": ONE,
    "role vectors": SERIAL,
    "rotation": SERIAL | {"streams.rotations": (0.0, 90.0, 0.0), "optim.stream_embedding_lr": 0.0},
    "streams": BESIDE,
    "streams, system blind": BESIDE | {"streams.lags": (("system", "data", "never"),)},
    "plan and door": DOOR,
    "plan, latent": PLAN,
    "delimiters, first": ONE | FIRST,
    "streams, first": BESIDE | FIRST,
}
# The base knows the tasks, but not the roles: one mark stands for system and data.
BASE = {
    "data.options": ONE["data.options"]
    | {"marks": {"system": "<part>", "data": "<part>", "action": "<output>"}}
}


def get_config():
    """Returns the settings that all runs share: those of one stream."""
    config = default_config()
    config.steps = 600
    config.log_every = 50
    config.eval_every = 0

    config.streams.names = ("text",)
    config.streams.kinds = ("output",)

    config.data.converter = "roles"
    config.data.path = shared_file(TATOEBA, __file__)
    config.data.format = "role_tasks:live"
    config.data.tokenizer.model_type = "word"
    config.data.tokenizer.vocab_size = 1500
    config.data.tokenizer.reserved = RESERVED
    config.data.rows = 96
    config.data.batch_size = TABLES["serial"]
    config.data.eval_percent = 2.0

    config.model.d_model = 128
    config.model.num_layers = 3
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 32
    config.model.d_ff = 384
    config.model.rope_theta = 1e4

    config.optim.lr = 2e-3
    config.optim.b2 = 0.99
    config.optim.weight_decay = 0.01
    config.checkpoint.every = 0
    return config
