"""How good a student is where there are no real images: on synthetic ones that it has not learnt from.

They come of a call of the method in which nothing is kept: the next call's, as it were. A second trained network may
look at them too, which had no part in their making: how often it sees what the teacher sees tells how much of an image
is about its class, and how much only about this teacher.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dfkd_jax import parallel
from dfkd_jax.losses import divergence
from dfkd_jax.models.network import Network
from dfkd_jax.synth import replay
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Metrics, PRNGKey, PyTree

Program = Callable[[PyTree, PRNGKey, Network, Network, Network | None], Metrics]


def without_images(synthesis: PyTree) -> PyTree:
  """A method's state without its buffer, wherever that lies: fresh images need none."""
  return synthesis.replace(buffer=None) if replay.find_buffer(synthesis) is not None else synthesis


def compile_metrics(
    mesh: Mesh, make: Callable[[str | None], Synthesizer], synthesis: PyTree, *networks: Network | None
) -> Any:
  """Compiles (synthesis, key, teacher, student, judge | None) -> metrics, each [].

  Metrics are `held_out_agreement`, the share of fresh images of which the student says what the teacher says, and
  with a judge `judge_top1` and `judge_top5`, the shares of which the teacher's class is that of the judge, or among
  its five.

  Args:
    mesh: The devices.
    make: The name of the mapped axis -> the method, with room for just the images of one call: each is looked at once.
    synthesis: The method's state in the run; only shapes and places matter, here and below.
    *networks: Teacher, student, and the judge or None.
  """

  def metrics(synthesis, key, teacher, student, judge, *, axis):
    method = make(axis)
    key_init, key_call, key_sample = jax.random.split(key, 3)
    if hasattr(synthesis, 'buffer'):  # Else every sample is fresh anyway.
      new = method.init(key_init, teacher)
      fresh = {'latents': new.latents} if getattr(new, 'latents', None) is not None else {}  # None are carried on.
      synthesis, _ = method.synthesize(synthesis.replace(buffer=new.buffer, **fresh), key_call, teacher, student)
      images = replay.to_float(synthesis.buffer.images.reshape(-1, *synthesis.buffer.images.shape[2:]))
    else:
      images = method.sample(synthesis, key_sample).images
    wanted = teacher(images).logits
    found = {'held_out_agreement': divergence.agreement(student(images).logits, wanted).mean()}
    if judge is not None:
      label = wanted.argmax(-1)[..., None]
      ranked = jax.lax.top_k(judge(images).logits, min(5, wanted.shape[-1]))[1]
      found |= {'judge_top1': (ranked[..., :1] == label).mean(), 'judge_top5': (ranked == label).any(-1).mean()}
    return parallel.pmean(jax.tree.map(jnp.float32, found), axis)

  synthesis, one = without_images(synthesis), parallel.REPLICATED
  program = parallel.each_device(metrics, mesh, (parallel.specs(synthesis), one, one, one, one), one)
  return program.lower(synthesis, jax.random.key(0), *networks).compile()
