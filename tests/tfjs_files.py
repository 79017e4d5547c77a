"""Folders in the format of TensorFlow.js."""

import json


def write(folder, entries, data, cuts=(), **model):
  """Writes a model. Its data is cut into shards at the offsets `cuts`."""
  folder.mkdir(parents=True, exist_ok=True)
  edges = [0, *cuts, len(data)]
  paths = [f'group1-shard{index}of{len(edges) - 1}.bin' for index in range(1, len(edges))]
  for path, begin, end in zip(paths, edges, edges[1:], strict=False):
    (folder / path).write_bytes(data[begin:end])
  manifest = [{'paths': paths, 'weights': entries}]
  model = {'format': 'layers-model', 'weightsManifest': manifest} | model
  (folder / 'model.json').write_text(json.dumps(model))
  return folder
