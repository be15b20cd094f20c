"""The time that rewards cost the devices."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from diffusion_t5x.training.judging import Judging, Written
from diffusion_t5x.training.rewards import Grader, Rewards


@jax.jit
def long_update(x):
    return jax.lax.fori_loop(0, 200, lambda _, x: x @ x / 300, x)


def test_the_devices_wait_for_rewards_once_they_have_nothing_to_do():
    """An update ends after a batch is judged, then with the third text of the next one, and before the last one."""
    running = long_update(jnp.ones((300, 300)))
    judged, seen = [], []

    def reward(text, example):
        judged.append(text)
        if len(judged) == 7:
            running.block_until_ready()
        time.sleep(0.01)
        return 1.0

    class Seen:
        def write(self, step, folder, metrics):
            assert folder == "rollout" and (metrics["reward"], metrics["best_reward"]) == (1, 1)
            seen.append((step, metrics["reward_wait_seconds"], metrics["reward_seconds"]))

    texts = tiny.one_a_row([([3], [4, 5])] * 4, length=4)
    judging = Judging(Grader(Rewards(reward, group_size=2), None, str), Seen(), num_batches=1)
    batches = [Written(texts, texts.target_mask, {row: {} for row in range(4)}) for _ in range(3)]
    judging.add(batches)
    running = long_update(running)
    judging.judge_next(6, running)
    assert not running.is_ready() and judging.num_waiting == 2
    judging.judge_next(7, running)
    judging.judge_next(8, running)
    assert judging.num_waiting == 0 and len(judged) == 12
    assert all(batch.examples is None and not np.any(batch.texts.advantage) for batch in batches)
    (_, beside, _), (_, partly, spent), (_, after, alone) = seen
    assert [step for step, _, _ in seen] == [6, 7, 8]
    assert beside == 0 and 0.015 <= partly <= spent - 0.02 and 0.035 <= after <= alone + 0.1
