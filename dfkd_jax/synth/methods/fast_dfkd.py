"""FastDFKD: a meta-generator from which a few steps give a batch of images.

A call runs inversions from a copy of the meta-generator (inner loop), moves the
meta-generator by first-order MAML or Reptile (outer loop; both in synth/meta.py),
and adds the images to a replay buffer, from which the student's batches are drawn.

References:
  Fang et al., Up to 100x Faster Data-free Knowledge Distillation, AAAI 2022,
  https://arxiv.org/abs/2112.06253, algorithm 1. Where the text leaves room, the
  published code's behaviour is followed: first-order MAML adds up the gradients
  of all inner steps, the image kept is the one of the lowest loss before the
  step's update, and momentum on the moments weighs past against present.
"""

from typing import Any

from dfkd_jax import tasks
from dfkd_jax.synth import buffered
from dfkd_jax.synth import inversion as inversions
from dfkd_jax.synth.synthesizer import Synthesizer, passes_on

State = inversions.State


@passes_on(inversions.loop, without=('companion_terms',))
def fast_dfkd(
    *,
    image_shape: tuple[int, int, int],
    task: tasks.Task,
    adversarial_after: int = 19,
    capacity: int = 56_320,
    num_tasks: int = 1,
    axis: str | None = None,
    **numbers: Any,
) -> Synthesizer:
  """Makes the FastDFKD synthesizer; defaults are Fast-5 of the published CIFAR script.

  Args:
    image_shape: [H, W, C].
    task: What the teacher was trained for.
    adversarial_after: Calls before the adversarial term sets in. The published gate compares a
      count from one with its warm-up of 20: so 19 here, one call before distillation begins.
    capacity: Images that the buffer holds on this device; the published one never drops any.
    num_tasks: M, inversions on this device in one call; 1 is the published algorithm.
    axis: The mapped axis of devices, if any.
    **numbers: Of `meta.loop`. The published CIFAR runs take 2, 5 or 10 for `num_steps` and 139 for `reset_after`; the
      one for ImageNet has meta='reptile', carry_latents=True, restart_every=50 and keep='last'.
  """
  loop = inversions.loop(
      image_shape=image_shape, task=task, adversarial_after=adversarial_after, num_tasks=num_tasks, axis=axis,
      companion_terms=(), **numbers)
  return buffered.synthesizer(
      loop, image_shape=image_shape, task=task, capacity=capacity, num_tasks=num_tasks, axis=axis)
