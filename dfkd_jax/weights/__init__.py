"""Published weights: from files of PyTorch, Keras, TensorFlow.js, NumPy, Orbax or safetensors."""

from dfkd_jax.weights.card import Card, describe, digest_arrays, digest_files
from dfkd_jax.weights.formats.orbax import find_checkpoint, read_subtree
from dfkd_jax.weights.formats.safetensors import read_metadata, save_safetensors, to_safetensors
from dfkd_jax.weights.hub import check_hub_source, resolve
from dfkd_jax.weights.name_schemes import translate_names
from dfkd_jax.weights.probe import Probe, check_network, make_probe, read_probe
from dfkd_jax.weights.reading import load, read, read_embeddings
from dfkd_jax.weights.torch_layout import from_variables, to_variables

__all__ = ['Card', 'Probe', 'check_hub_source', 'check_network', 'describe', 'digest_arrays',
           'digest_files', 'find_checkpoint', 'from_variables', 'load', 'make_probe', 'read',
           'read_embeddings', 'read_metadata', 'read_probe', 'read_subtree', 'resolve',
           'save_safetensors', 'to_safetensors', 'to_variables', 'translate_names']
