r"""Estimates the communication between devices in a round, and its share of the time.

python benchmarks/scaling.py --config=configs/cifar10.py:fast_dfkd,fast5,resnet34-resnet18

The two programs of a round are compiled, not run, for four virtual CPU devices with a task each.
This needs no weights and no data. A collective in a loop counts once for each iteration. XLA
combines collectives that do not depend on each other on GPU and TPU. `in turn` is the number that
remains, and each of them costs a latency.

With weak scaling, every device does the work that the config gives to one device. With strong
scaling, devices share that work. G, T and S are the FLOP of a forward pass of generator, teacher
and student. The FLOP of a round are

  calls x inner steps x images x (3 G + 2 T + 2 S) + student steps x images x (T + 3 S)

Synthesis has S only with an adversarial term. A ring of n devices sends each byte 2 (n - 1) / n
times over its slowest link. The estimate is pessimistic because nothing overlaps. Speeds, latencies
and the reached share of the peak are assumptions, see LINKS. Nothing here is a measurement.
"""

import argparse
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

DEVICES = 4
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', ' '.join((  # Fast compilation: the programs are never run.
    f'--xla_force_host_platform_device_count={DEVICES}', '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true')))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from dfkd_jax import augment, cli, distill, parallel  # noqa: E402
from dfkd_jax.config import build, build_method  # noqa: E402
from dfkd_jax.config.records import resolve  # noqa: E402
from dfkd_jax.runs import programs  # noqa: E402

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's64': 8, 'u64': 8,
         'f64': 8}
_OPCODE = re.compile(r'(?<=[\s)}\]])([a-z][a-z\-]*)\(')


class Link(NamedTuple):
  """Assumptions about devices and their links."""

  flops: float  # FLOP per second that a device reaches.
  inner: float  # Bytes per second, one way, within a group.
  outer: float  # Bytes per second, one way, between groups.
  group: int  # Devices in a group.
  latencies: tuple[float, float]  # Seconds of a small all-reduce, within and between groups.


LINKS = {
    'H100, 0.2 of 400 TFLOP/s; 450 GB/s and 10 us among 8, 400 Gb/s and 30 us beyond': Link(
        0.2 * 400e12, 450e9, 50e9, 8, (10e-6, 30e-6)),
    'TPU v5e, 0.2 of 197 TFLOP/s; 100 GB/s and 10 us': Link(
        0.2 * 197e12, 100e9, 100e9, 256, (10e-6, 10e-6)),
}


class Traffic(NamedTuple):
  """Collectives of one kind in one round."""

  count: int  # As written.
  num_bytes: int
  in_turn: int  # After combining.


def computations(text: str) -> dict[str, list[str]]:
  """Returns the lines of each computation of an HLO module. The first to run is 'ENTRY'."""
  by_name, lines = {}, []
  for line in text.splitlines():
    if match := re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line):
      lines = by_name.setdefault('ENTRY' if match[1] else match[2], [])
    elif ' = ' in line:
      lines.append(line.strip())
  return by_name


def traffic(text: str) -> dict[str, Traffic]:
  """Returns the traffic of an HLO module by kind. Loops count once for each iteration."""
  by_name = computations(text)
  totals = {}
  for name, times in _calls(by_name, 'ENTRY', 1):
    levels, last = {}, dict.fromkeys(KINDS, 0)
    for line in by_name[name]:
      target, kind, operands, size = _parse(line)
      level = max((levels.get(operand, 0) for operand in operands), default=0)
      if kind in KINDS:
        level += 1
        last[kind] = max(last[kind], level)
        total = totals.get(kind, Traffic(0, 0, 0))
        totals[kind] = total._replace(
            count=total.count + times, num_bytes=total.num_bytes + times * size)
      levels[target] = level
    for kind, level in last.items():
      if level:
        totals[kind] = totals[kind]._replace(in_turn=totals[kind].in_turn + times * level)
  return totals


def _calls(by_name: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
  """Yields each call of a computation, and how often it is repeated."""
  yield name, times
  for line in by_name[name]:
    turns = 1
    if match := re.search(r'body=%?([\w.\-]+)', line):
      turns = int(re.search(r'known_trip_count[^\d]*(\d+)', line)[1])
    for called in re.findall(
        r'(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)', line):
      if called in by_name and not re.search(r' (?:all-reduce|reduce\S*|fusion)\(', line):
        yield from _calls(by_name, called, times * turns)
    if match := re.search(r'branch_computations=\{([^}]*)\}', line):
      for called in re.findall(r'[\w.\-]+', match[1]):
        yield from _calls(by_name, called, times)


def _parse(line: str) -> tuple[str, str, list[str], int]:
  """Returns the target, operation and operands of a line, and the bytes of its result."""
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
  """Returns a config with a task on each device, and the work of the given config on each."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.method.num_tasks = devices
    config.distill.batch_size *= devices
    for field in ('capacity', 'bank_size'):
      if field in config.method:
        config.method[field] *= devices
  return config


def compile_round(config) -> programs.Programs:
  """Compiles both programs of a round for `DEVICES` devices, from shapes."""
  mesh, key, settings = parallel.make_mesh(DEVICES), jax.random.key(0), resolve(config)
  rounds, method = settings.distill, settings.method
  teacher, student = (
      jax.eval_shape(lambda network=network: build.fresh_network(network, key))
      for network in (settings.teacher, settings.student))
  tx = build.optimizer(
      settings.optimizer, rounds.learning_rounds, rounds.steps_per_round)
  synthesis = jax.eval_shape(build_method.synthesizer(method, 1)(None).init, key, teacher)
  learner = jax.eval_shape(lambda network: distill.init(network, tx), student)
  state = programs.State(synthesis, learner)
  plan = programs.Plan(
      mesh, build_method.synthesizer(method, DEVICES), tx, rounds,
      augment.create(**settings.augment), method.num_tasks // DEVICES)
  return programs.compile_programs(plan, state, teacher)


def round_traffic(call_traffic: dict[str, Traffic], config) -> dict[str, Traffic]:
  """Returns the traffic of a round from the traffic of a call."""
  return {kind: Traffic(*(config.distill.calls_per_round * number for number in traffic))
          for kind, traffic in call_traffic.items()}


def flops_of_round(config) -> float:
  """Returns the FLOP of one device in a round."""
  key, section, method = jax.random.key(0), config.distill, config.method
  image = jnp.zeros((1, *config.dataset.image_shape))
  flops = lambda function, *inputs: jax.jit(function).lower(*inputs).cost_analysis()['flops']
  settings = resolve(config)
  networks = [jax.eval_shape(lambda network=network: build.fresh_network(network, key))
              for network in (settings.teacher, settings.student)]
  teacher, student = (flops(lambda network, x: network(x).logits, network, image)
                      for network in networks)
  forward = 0.0
  if 'latent_dim' in method:
    generator = build_method.generator(settings.method.generator)
    latents = jnp.zeros(build_method.latent_shape(settings.method, 1))
    variables = jax.eval_shape(lambda: generator.init(key, latents))
    apply = lambda v, z: generator.apply(v, z, mutable=['batch_stats'])[0]
    forward = flops(apply, variables, latents)
  inner = 3 * forward + 2 * teacher + (2 * student if config.factors.adversarial else 0)
  return section.calls_per_round * method.num_steps * method.batch_size * inner + (
      section.steps_per_round * section.batch_size * (teacher + 3 * student))


def estimate_seconds(
    by_program: dict[str, dict[str, Traffic]], link: Link, devices: int
) -> tuple[float, float]:
  """Returns the seconds of latencies and of transfers in a round."""
  is_far = devices > link.group
  speed, latency = link.outer if is_far else link.inner, link.latencies[is_far]
  parts = [traffic for kinds in by_program.values() for traffic in kinds.values()]
  num_bytes = 2 * (devices - 1) / devices * sum(part.num_bytes for part in parts)
  return latency * sum(part.in_turn for part in parts), num_bytes / speed


def print_tables(by_program: dict[str, dict[str, Traffic]], flops: float) -> None:
  """Prints the traffic, and the share of communication for each link."""
  print(f'{"program":12}{"collective":20}{"a round":>10}{"in turn":>10}{"MiB a round":>14}')
  for program, kinds in by_program.items():
    for kind, part in kinds.items():
      mib = part.num_bytes / 2**20
      print(f'{program:12}{kind:20}{part.count:10,}{part.in_turn:10,}{mib:14,.1f}')
  for about, link in LINKS.items():
    busy = flops / link.flops
    print(f'\n{about}\n{flops / 1e12:,.0f} TFLOP a round and device, {busy:.2f} s\n'
          f'{"devices":>8}{"latency s":>12}{"transfer s":>12}{"weak, share":>13}'
          f'{"strong, share":>15}')
    for devices in (2, 4, 8, 16, 32, 64, 128, 256):
      latency, transfer = estimate_seconds(by_program, link, devices)
      weak, strong = ((latency + transfer) / (latency + transfer + compute)
                      for compute in (busy, busy / devices))
      print(f'{devices:8}{latency:12.3f}{transfer:12.3f}{weak:13.1%}{strong:15.1%}')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument('--config', default='configs/cifar10.py:fast_dfkd,fast5,resnet34-resnet18')
  options, overrides = parser.parse_known_args()
  config = cli.load(options.config)
  cli.override(config, overrides)
  compiled = compile_round(spread(config, DEVICES))
  by_program = {name: round_traffic(traffic(getattr(compiled, name).as_text()), config)
                for name in ('synthesize', 'distill')}
  print_tables(by_program, flops_of_round(config))


if __name__ == '__main__':
  main()
