"""Measures FastDFKD's image-steps/s and student images/s, compile time, peak memory and FLOPs.

python benchmarks/throughput.py --pair=wrn40_2-wrn16_1 --batch_size=256

Weights are random, because speed does not depend on them. An image-step is one inner step on one
image. Times are the best of `--repeats` runs, without compilation. Peak memory is the memory that
XLA reserves for arguments, results and temporaries of a compiled program. FLOPs come from XLA's
cost analysis of a program of one step, because it counts the body of a loop once.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import optax

from dfkd_jax import augment, distill, models, report, synth, tasks


def compile_program(function, *arguments):
  """Returns a compiled program and the seconds to compile it."""
  began = time.perf_counter()
  program = jax.jit(function).lower(*arguments).compile()
  return program, time.perf_counter() - began


def flops(program) -> float:
  analysis = program.cost_analysis() or {}
  analysis = analysis[0] if isinstance(analysis, list) else analysis
  return float(analysis.get('flops', float('nan')))


def peak_mib(program) -> float:
  """Returns the memory of arguments (also networks and buffer), results and temporaries."""
  sizes = program.memory_analysis()
  held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  return (held + sizes.temp_size_in_bytes) / 2**20


def best_seconds(function, repeats: int) -> float:
  """Returns the least wall time of a call, which waits for the device."""
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - began)
  return min(times)


def measure(
    pair: str, batch_size: int, num_steps: int, student_steps: int, repeats: int, dtype
) -> dict:
  """Measures one pair of networks."""
  teacher_name, student_name = pair.split('-')
  shape, task = (32, 32, 3), tasks.classification(10)
  keys = jax.random.split(jax.random.key(0), 5)
  teacher = models.create_network(models.create(teacher_name, 10, dtype=dtype), keys[0], shape)
  student = models.create_network(models.create(student_name, 10, dtype=dtype), keys[1], shape)
  make = functools.partial(
      synth.create, 'fast_dfkd', generator=models.Generator(dtype=dtype), image_shape=shape,
      task=task, factors=synth.Factors(one_hot=0.4, batch_norm=10.0, adversarial=1.1),
      batch_size=batch_size, sample_batch_size=batch_size, capacity=4 * batch_size,
      augment=augment.crop_and_flip, adversarial_after=0)
  synthesizer = make(num_steps=num_steps)
  state = synthesizer.init(keys[2], teacher)
  tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.2, momentum=0.9))
  learner = distill.init(student, tx)
  steps = lambda count: functools.partial(
      distill.distill, synthesizer=synthesizer, tx=tx, num_steps=count,
      augment=augment.crop_and_flip)

  synthesize, compile_synthesis = compile_program(
      synthesizer.synthesize, state, keys[3], teacher, student)
  train, compile_student = compile_program(steps(student_steps), learner, state, keys[4], teacher)
  one_synthesis, _ = compile_program(
      make(num_steps=1).synthesize, state, keys[3], teacher, student)
  one_step, _ = compile_program(steps(1), learner, state, keys[4], teacher)
  state, _ = synthesize(state, keys[3], teacher, student)
  synthesis = best_seconds(lambda: synthesize(state, keys[3], teacher, student), repeats)
  student_seconds = best_seconds(lambda: train(learner, state, keys[4], teacher), repeats)
  return {
      'pair': pair, 'batch': batch_size, 'dtype': jnp.dtype(dtype or jnp.float32).name,
      'synthesis_image_steps_per_second': batch_size * num_steps / synthesis,
      'student_images_per_second': batch_size * student_steps / student_seconds,
      'compile_seconds': {'synthesis': compile_synthesis, 'student': compile_student},
      'peak_mib': {'synthesis': peak_mib(synthesize), 'student': peak_mib(train)},
      'gflop_per_image_step': {'synthesis': flops(one_synthesis) / batch_size / 1e9,
                               'student': flops(one_step) / batch_size / 1e9},
      'device': report.device(), 'versions': report.versions()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pair', nargs='+', default=['wrn40_2-wrn16_1', 'resnet34-resnet18'])
  parser.add_argument('--batch_size', type=int, default=256)
  parser.add_argument('--num_steps', type=int, default=5)
  parser.add_argument('--student_steps', type=int, default=4)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--dtype', default=None, help='of the computation, such as bfloat16')
  options = parser.parse_args()
  dtype = jnp.dtype(options.dtype) if options.dtype else None
  for pair in options.pair:
    print(json.dumps(measure(pair, options.batch_size, options.num_steps, options.student_steps,
                             options.repeats, dtype)))


if __name__ == '__main__':
  main()
