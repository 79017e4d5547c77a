"""Files of weights that a run leaves behind."""

import json
import pathlib

import jax

from dfkd_jax import parallel, report, weights
from dfkd_jax.config.records import NetworkSettings
from dfkd_jax.models.network import Network


def write_networks(
    workdir: pathlib.Path, stem: str, last: Network, best: Network | None,
    settings: NetworkSettings) -> tuple[str, ...]:
  """Writes the last network and, if it was kept, the best one; returns the names of the files."""
  networks = {f'{stem}.safetensors': last, f'{stem}_best.safetensors': best}
  kept = {name: network for name, network in networks.items() if network is not None}
  with parallel.raise_on_all_processes():
    for name, network in kept.items():
      write_weights(workdir / name, network, settings)
  return tuple(kept)


def write_weights(path: pathlib.Path, network: Network, settings: NetworkSettings) -> None:
  """Writes a network as safetensors, which `teacher.source` takes; replaces the file at once.

  The file carries the network's preprocessing, and a probe that shows whether a reader computes
  the same.
  """
  if not parallel.is_first():
    return
  network = jax.device_get(parallel.local_copy(network))
  about = {'model': settings.name, 'mean': network.mean, 'std': network.std, 'bgr': network.bgr,
           'resize': network.resize}
  data = weights.to_safetensors(
      {'params': network.params, 'batch_stats': network.batch_stats},
      {'network': json.dumps(about)}, probe=weights.make_probe(network, settings.image_shape))
  with report.reporting_disk_errors(path), report.replace_file(path) as file:
    file.write(data)
