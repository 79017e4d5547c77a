"""Measures a student on fresh synthetic images, if there are no real ones.

No student has learnt from these images. A judge, a second trained network that had no part in
making them, may look at them too. How often it sees the teacher's class shows how much of an image
is about its class, and how much is about this teacher only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dfkd_jax import parallel
from dfkd_jax.losses import divergence
from dfkd_jax.models.network import Network
from dfkd_jax.synth import host_replay
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import PyTree


def compile_metrics(
    mesh: Mesh, make: Callable[[str | None], Synthesizer], synthesis: PyTree,
    *networks: Network | None) -> Any:
  """Compiles (synthesis without images, key, teacher, student, judge | None) -> metrics, each [].

  `held_out_agreement` is the fraction of fresh images on which student and teacher predict the
  same class. With a judge, `judge_top1` and `judge_top5` are the fractions of images for which the
  teacher's class is the judge's top-1, or in its top-5. `make` maps the name of the mapped axis to
  the method. Only shapes and shardings of its state and of the networks matter here.
  """

  def metrics(synthesis, key, teacher, student, judge, *, axis):
    images = make(axis).fresh_images(synthesis, key, teacher, student).images
    logits = teacher(images).logits
    agreement = divergence.agreement(student(images).logits, logits).mean()
    fractions = {'held_out_agreement': agreement}
    if judge is not None:
      label = logits.argmax(-1)[..., None]
      ranked = jax.lax.top_k(judge(images).logits, min(5, logits.shape[-1]))[1]
      fractions['judge_top1'] = (ranked[..., :1] == label).mean()
      fractions['judge_top5'] = (ranked == label).any(-1).mean()
    return parallel.pmean(jax.tree.map(jnp.float32, fractions), axis)

  synthesis, one = host_replay.strip_images(synthesis), parallel.REPLICATED
  program = parallel.each_device(
      metrics, mesh, (parallel.specs(synthesis), one, one, one, one), one)
  return program.lower(synthesis, jax.random.key(0), *networks).compile()
