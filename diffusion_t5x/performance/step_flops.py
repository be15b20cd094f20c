"""FLOPs of training: the matrix products of a step (see `models.flops`)."""

from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.performance.model_flops import forward_flops
from diffusion_t5x.training.rollout import Rollout


def step_flops(
    config: ModelConfig,
    objective: Objective,
    batch_size: int,
    length: int,
    encoder_length: int = 0,
    teacher: ModelConfig | None = None,
) -> int:
    """FLOPs of one training step: forward of every pass, plus twice that for the backward pass (the teacher has none).

    Args:
      config: of the model, with `vocab_size` set.
      objective: says what its passes are.
      batch_size: rows.
      length: slots of a row; of an encoder-decoder, of its decoder.
      encoder_length: slots of an encoder-decoder's inputs.
      teacher: its dimensions; None takes the model's.
    """
    total = 0
    for each in objective.passes:
        model, times = (teacher or config, 1) if each.by_teacher else (config, 3)
        total += times * forward_flops(
            model, each.slots * length, predicted=length, encoder_length=encoder_length, encodes=each.encodes
        )
    return batch_size * total


def rollout_flops(config: ModelConfig, rollout: Rollout, batch_size: int, num_inputs: int, step: int) -> int:
    """FLOPs of decoding the texts that a training step learns from, if none ends early.

    Prompts are read once, block after block is written in the decoder's steps, and once more for the cache.

    Args:
      config: of the model, with `vocab_size` set.
      rollout: how texts are written.
      batch_size: texts.
      num_inputs: slots of a prompt.
      step: training steps taken before; texts grow with it.
    """
    length = rollout.length(step)
    row = num_inputs + rollout.bucket(length)
    size = rollout.decoder.block_size
    steps = rollout.decoder.inner.most_steps(size)
    block = steps * forward_flops(config, size, keys=row) + forward_flops(config, size, keys=row, predicted=0)
    return batch_size * (forward_flops(config, row, predicted=0) + -(-length // size) * block)
