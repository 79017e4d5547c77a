r"""What devices say to each other in a round, from the compiled programs, and what share of the time that would be.

python benchmarks/scaling.py --config=configs/cifar10.py:fast_dfkd,fast5,resnet34-resnet18

The two programs of a round are compiled, not run, for four virtual CPU devices with a task each; no weights and no data
are needed. A collective in a loop counts as often as the loop turns. Those that do not wait for each other go as one,
as XLA combines them on GPU and TPU: `in turn` is how many are left, and each of these costs a latency.

Every device has what the config gives to one (weak scaling), or its share of that (strong). A round computes
calls x inner steps x images x (3 G + 2 T + 2 S) + student steps x images x (T + 3 S) FLOP, with G, T, S those of a
forward pass of generator, teacher, student; S in synthesis only with an adversarial term. A ring of n sends each byte
2 (n - 1) / n times over the slowest of its links. Nothing overlaps, which is pessimistic. Speeds, latencies and the
share of the peak that is reached are assumptions, see LINKS; they are printed, and nothing here is a measurement.
"""

import argparse
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dfkd_jax import augment, cli, distill, parallel
from dfkd_jax.config import build, build_method, build_optimizer
from dfkd_jax.config.records import resolve
from dfkd_jax.runs import programs

DEVICES = 4
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', ' '.join((  # Only the programs' text is wanted, not their speed.
    f'--xla_force_host_platform_device_count={DEVICES}', '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true')))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's64': 8, 'u64': 8, 'f64': 8}
_OPCODE = re.compile(r'(?<=[\s)}\]])([a-z][a-z\-]*)\(')


class Link(NamedTuple):
  """Devices, and what connects them: all assumptions."""

  flops: float  # a second that a device reaches
  inner: float  # bytes a second, one way, among the `group` nearest
  outer: float  # and beyond
  group: int
  latencies: tuple[float, float]  # seconds of a small all-reduce, among the nearest and beyond


LINKS = {
    'H100, 0.2 of 400 TFLOP/s; 450 GB/s and 10 us among 8, 400 Gb/s and 30 us beyond': Link(
        0.2 * 400e12, 450e9, 50e9, 8, (10e-6, 30e-6)),
    'TPU v5e, 0.2 of 197 TFLOP/s; 100 GB/s and 10 us': Link(0.2 * 197e12, 100e9, 100e9, 256, (10e-6, 10e-6)),
}


class Traffic(NamedTuple):
  """Of one kind of collective in one round."""

  count: int  # as written
  num_bytes: int
  in_turn: int  # that wait for each other


def computations(text: str) -> dict[str, list[str]]:
  """The lines of each computation of an HLO module; the one that is run first is 'ENTRY'."""
  found, lines = {}, []
  for line in text.splitlines():
    if match := re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line):
      lines = found.setdefault('ENTRY' if match[1] else match[2], [])
    elif ' = ' in line:
      lines.append(line.strip())
  return found


def traffic(text: str) -> dict[str, Traffic]:
  """What an HLO module sends, by kind; loops as often as they turn."""
  every = computations(text)
  found = {}
  for name, times in _turns(every, 'ENTRY', 1):
    levels, last = {}, dict.fromkeys(KINDS, 0)
    for line in every[name]:
      target, kind, operands, size = _parsed(line)
      level = max((levels.get(operand, 0) for operand in operands), default=0)
      if kind in KINDS:
        level += 1
        last[kind] = max(last[kind], level)
        before = found.get(kind, Traffic(0, 0, 0))
        found[kind] = before._replace(count=before.count + times, num_bytes=before.num_bytes + times * size)
      levels[target] = level
    for kind, level in last.items():
      if level:
        found[kind] = found[kind]._replace(in_turn=found[kind].in_turn + times * level)
  return found


def _turns(every: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
  """Each call of a computation, and how often it is made."""
  yield name, times
  for line in every[name]:
    turns = 1
    if match := re.search(r'body=%?([\w.\-]+)', line):
      turns = int(re.search(r'known_trip_count[^\d]*(\d+)', line)[1])
    for called in re.findall(r'(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)', line):
      if called in every and not re.search(r' (?:all-reduce|reduce\S*|fusion)\(', line):
        yield from _turns(every, called, times * turns)
    if match := re.search(r'branch_computations=\{([^}]*)\}', line):
      for called in re.findall(r'[\w.\-]+', match[1]):
        yield from _turns(every, called, times)


def _parsed(line: str) -> tuple[str, str, list[str], int]:
  """Target, operation, operands, and bytes of the result of a line."""
  target, _, rest = line.removeprefix('ROOT ').partition(' = ')
  match = _OPCODE.search(rest)
  if not match:
    return target.lstrip('%'), '', [], 0
  size = sum(
      BYTES.get(kind, 4) * math.prod(int(length) for length in shape.split(',') if length)
      for kind, shape in re.findall(r'(\w+)\[([\d,]*)\]', rest[:match.start()]))
  arguments = re.findall(r'%([\w.\-]+)', rest[match.end():].split('), ')[0])
  return target.lstrip('%'), match[1].removesuffix('-start'), arguments, size


def spread(config, devices: int):
  """The config with a task on each of so many devices, and as much for each as it has for one."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.method.num_tasks = devices
    config.distill.batch_size *= devices
    for of_all in ('capacity', 'bank_size'):
      if of_all in config.method:
        config.method[of_all] *= devices
  return config


def programs(config) -> programs.Programs:
  """Both programs of a round for `DEVICES` devices, from shapes alone."""
  mesh, key, settings = parallel.make_mesh(DEVICES), jax.random.key(0), resolve(config)
  teacher, student = (
      jax.eval_shape(lambda network=network: build.fresh_network(network, key))
      for network in (settings.teacher, settings.student))
  tx = build_optimizer.optimizer(
      settings.optimizer, settings.distill.learning_rounds, settings.distill.steps_per_round)
  synthesis = jax.eval_shape(build_method.synthesizer(settings.method, 1)(None).init, key, teacher)
  state = programs.State(synthesis, jax.eval_shape(lambda network: distill.init(network, tx), student))
  plan = programs.Plan(
      mesh, build_method.synthesizer(settings.method, DEVICES), tx, settings.distill,
      augment.create(**settings.augment), settings.method.num_tasks // DEVICES)
  return programs.compile_programs(plan, state, teacher)


def of_round(found: dict[str, Traffic], config) -> dict[str, Traffic]:
  """What a program sends in a round, which runs it once a call."""
  return {kind: Traffic(*(config.distill.calls_per_round * number for number in each)) for kind, each in found.items()}


def flops_of_round(config) -> float:
  """FLOP of what one device has to do."""
  key, section, method = jax.random.key(0), config.distill, config.method
  settings = resolve(config)
  image = jnp.zeros((1, *config.dataset.image_shape))
  of = lambda function, *inputs: jax.jit(function).lower(*inputs).cost_analysis()['flops']
  teacher, student = (
      of(lambda network, x: network(x).logits, jax.eval_shape(
          lambda network=network: build.fresh_network(network, key)), image)
      for network in (settings.teacher, settings.student))
  made = 0.0
  if 'latent_dim' in method:
    generator = build_method.generator(settings.method.generator)
    latents = jnp.zeros(build_method.latent_shape(settings.method, 1))
    variables = jax.eval_shape(lambda: generator.init(key, latents))
    made = of(lambda v, z: generator.apply(v, z, mutable=['batch_stats'])[0], variables, latents)
  inner = 3 * made + 2 * teacher + (2 * student if config.factors.adversarial else 0)
  return section.calls_per_round * method.num_steps * method.batch_size * inner + (
      section.steps_per_round * section.batch_size * (teacher + 3 * student))


def seconds_of(found: dict[str, dict[str, Traffic]], link: Link, devices: int) -> tuple[float, float]:
  """What a round's collectives take on so many devices: latencies, and transfers."""
  far = devices > link.group
  speed, latency = link.outer if far else link.inner, link.latencies[far]
  all_of = [each for kinds in found.values() for each in kinds.values()]
  sent = 2 * (devices - 1) / devices * sum(each.num_bytes for each in all_of)
  return latency * sum(each.in_turn for each in all_of), sent / speed


def report(found: dict[str, dict[str, Traffic]], flops: float) -> None:
  """Both tables."""
  print(f'{"program":12}{"collective":20}{"a round":>10}{"in turn":>10}{"MiB a round":>14}')
  for program, kinds in found.items():
    for kind, each in kinds.items():
      print(f'{program:12}{kind:20}{each.count:10,}{each.in_turn:10,}{each.num_bytes / 2**20:14,.1f}')
  for about, link in LINKS.items():
    busy = flops / link.flops
    print(f'\n{about}\n{flops / 1e12:,.0f} TFLOP a round and device, {busy:.2f} s\n'
          f'{"devices":>8}{"latency s":>12}{"transfer s":>12}{"weak, share":>13}{"strong, share":>15}')
    for devices in (2, 4, 8, 16, 32, 64, 128, 256):
      latency, transfer = seconds_of(found, link, devices)
      share = lambda compute, sent=latency + transfer: sent / (sent + compute)
      print(f'{devices:8}{latency:12.3f}{transfer:12.3f}{share(busy):13.1%}{share(busy / devices):15.1%}')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument('--config', default='configs/cifar10.py:fast_dfkd,fast5,resnet34-resnet18')
  options, overrides = parser.parse_known_args()
  config = cli.load(options.config)
  cli.override(config, overrides)
  compiled = programs(spread(config, DEVICES))
  found = {name: of_round(traffic(getattr(compiled, name).as_text()), config) for name in ('synthesize', 'distill')}
  report(found, flops_of_round(config))


if __name__ == '__main__':
  main()
