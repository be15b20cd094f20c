"""FLOPs of training: the matrix products of a step (see `performance.model_flops`)."""

from diffusion_t5x.decoding.block import BlockDecoder
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
    """Returns the FLOPs of one training step: forward passes, plus twice that for backward (the teacher has none).

    Args:
      config: the model's config, with `vocab_size` set.
      objective: defines the passes.
      batch_size: number of rows.
      length: number of slots in a row; for an encoder-decoder, in the decoder's row.
      encoder_length: number of slots of an encoder-decoder's inputs.
      teacher: the teacher's dimensions; None takes the model's.
    """
    total = 0
    for each in objective.passes:
        model, times = (teacher or config, 1) if each.by_teacher else (config, 3)
        total += times * forward_flops(
            model,
            each.slots * length,
            predicted=length if each.reads_out else 0,
            encoder_length=encoder_length,
            encodes=each.encodes,
        )
    return batch_size * total


def rollout_flops(config: ModelConfig, rollout: Rollout, batch_size: int, num_inputs: int, step: int) -> int:
    """Returns the FLOPs of decoding the texts of one training step, if none ends early and all are the student's.

    Prompts are read once; each block is written in the decoder's steps and read once more for the cache.

    Args:
      config: the model's config, with `vocab_size` set.
      rollout: settings of a rollout in blocks.
      batch_size: number of texts.
      num_inputs: number of slots of a prompt.
      step: training steps taken before; texts grow with it.
    """
    length = rollout.length(rollout.number(step))
    row = num_inputs + rollout.bucket(length)
    assert isinstance(rollout.decoder, BlockDecoder)
    size = rollout.decoder.block_size
    steps = rollout.decoder.inner.most_steps(size)
    block = steps * forward_flops(config, size, keys=row) + forward_flops(config, size, keys=row, predicted=0)
    return batch_size * (forward_flops(config, row, predicted=0) + -(-length // size) * block) // rollout.passes
