"""Generated bad files: weights of every format, data sets and embeddings."""

import functools
import io
import os
import shutil
import warnings
import zipfile

import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy_runs
from flax import traverse_util
from hypothesis import strategies as st
from keras_files import h5
from refusals import folder, generate, refused, run_main
from safetensors.numpy import save as safetensors
from tfjs_files import write
from torch_files import Saver

from dfkd_jax import models, weights
from dfkd_jax.runs.checkpoint import Checkpoints


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


@functools.cache
def variables():
  """Of the toy teacher, by path in Flax's layout."""
  return weights.read(toy_runs.teacher_file())


TORCH = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean',
         'var': 'running_var'}
KERAS = {'kernel': 'kernel', 'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean',
         'var': 'moving_variance'}


def named(arrays, leaves, dot):
  """Arrays by the names of another code base, in its layout."""
  found = {}
  for path, array in arrays.items():
    *layers, leaf = path.split('.')[1:]
    name = 'bias' if leaf == 'bias' and layers[-1][:2] != 'bn' else leaves[leaf]
    turned = leaves is TORCH and leaf == 'kernel' and array.ndim > 1
    found[dot.join([*layers, name])] = np.ascontiguousarray(
        np.moveaxis(array, (-1, -2), (0, 1)) if turned else array)
  return found


def nested(arrays):
  return traverse_util.unflatten_dict({tuple(name.split('.')): array
      for name, array in arrays.items()})


def torch_file(form, path, arrays):
  saver = Saver()
  path.write_bytes(getattr(saver,
                           form)({name: saver.tensor(a)
                               for name, a in named(arrays, TORCH, '.').items()}))


def keras_archive(path, arrays):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('model.weights.h5', h5(named(arrays, KERAS, '/')))


def tfjs(path, arrays):
  arrays = named(arrays, KERAS, '/')
  entries = [{'name': name, 'shape': list(array.shape), 'dtype': array.dtype.name}
      for name, array in arrays.items()]
  write(path, entries, b''.join(array.tobytes() for array in arrays.values()), cuts=(40,))


def orbax(path, arrays):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path.absolute(), nested(arrays))


def own(path, arrays):
  with Checkpoints(path) as checkpoints:
    checkpoints.save(3, {'student': {'network': nested(arrays)}}, {})


def npz(path, arrays):
  with path.open('wb') as file:
    np.savez(file, **named(arrays, TORCH, '.'))


WRITERS = {
    'w.safetensors': lambda path, arrays: path.write_bytes(safetensors(arrays)), 'w.npz': npz,
    'zip.pth': functools.partial(torch_file, 'zip'),
    'legacy.pth': functools.partial(torch_file, 'legacy'),
    'w.h5': lambda path, arrays: path.write_bytes(h5(named(arrays, KERAS, '/'))),
    'w.keras': keras_archive, 'tfjs': tfjs, 'orbax': orbax, 'own': own}


@functools.cache
def written(form):
  """Where good weights of a format lie."""
  path = toy_runs.folder() / 'formats' / form
  path.parent.mkdir(exist_ok=True)
  WRITERS[form](path, dict(variables()))
  return path


@pytest.mark.parametrize('form', WRITERS)
def test_weights_that_are_in_order_are_read(form):
  """Else nothing would follow from what comes below."""
  module = models.create('convnet', toy_runs.CLASSES, **toy_runs.NETWORKS['teacher'])
  found = traverse_util.flatten_dict(weights.load(written(form), module, toy_runs.IMAGE), sep='.')
  for name, array in variables().items():
    np.testing.assert_array_equal(found[name], array)


def copy(source, target):
  (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def largest(path):
  """A file, or of a folder the one whose loss is felt: where names or most numbers are."""
  if path.is_file():
    return [path]
  files = [each for each in path.rglob('*') if each.is_file()
           and each.name in ('_METADATA', 'model.json')]
  data = [each for each in path.rglob('*') if each.is_file()
          and (each.parent.name == 'd' or each.suffix == '.bin')]
  return [*files, max(data, key=lambda each: each.stat().st_size)]


def cut(share, path):
  for each in largest(path):
    each.write_bytes(each.read_bytes()[:int(share * each.stat().st_size)])


def flip(bit, path):
  """One bit of what tells the format."""
  each = largest(path)[0]
  data = bytearray(each.read_bytes())
  start = 4 if path.suffix == '.safetensors' else 0
  # The second byte of a legacy file is the protocol's version, and other versions will do.
  second = bit // 8 if path.name != 'legacy.pth' else 0
  data[start + second] ^= 1 << bit % 8
  each.write_bytes(data)


def replaced(data, path):
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  path.write_bytes(data)


def no_file(kind, path):
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  if kind == 'folder':
    path.mkdir()
  elif kind == 'full folder':
    (path / 'inside').mkdir(parents=True)
    (path / 'inside' / 'notes.txt').write_text('none')
  elif kind != 'gone':
    os.symlink({'loop': path, 'dangling': 'nowhere', 'unreadable': '/proc/self/mem'}[kind], path)


OTHERS = (b'', b'\0', b'Nothing of interest.', b'{"a": 1}', b'{', b'\x89PNG\r\n\x1a\n' + bytes(20),
          b'PK\x03\x04', b'\x80\x02}q\x00.', b'\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.',
          b'\xff\xd8\xff\xe0' + bytes(9),
          b'\x89HDF\r\n\x1a\n', bytes(8), bytes(5000), b'\x93NUMPY\x01\0', b'\x1f\x8b\x08', b'[]',
          b'null')
DAMAGES = st.tuples(st.sampled_from(sorted(WRITERS)), st.one_of(
    st.tuples(st.just(cut), st.floats(0, 0.95)), st.tuples(st.just(flip), st.integers(0, 15)),
    st.tuples(st.just(replaced), st.sampled_from(OTHERS)),
    st.tuples(st.just(no_file), st.sampled_from(
        ['folder', 'full folder', 'gone', 'loop', 'dangling', 'unreadable'])))).filter(
    lambda drawn: (drawn[0], drawn[1][0]) not in (('own', flip),
                                                  ('orbax',
                                                   flip)))  # JSON, whose spaces do not count.


def test_weights_that_are_damaged():

  def run(drawn):
    form, (damage, how) = drawn
    with folder() as here:
      copy(written(form), here / form)
      damage(how, here / form)
      refused(run_main(f'--config.teacher.source={form}', '--workdir=run', kind='bare'), here, form)

  generate('damaged weights', DAMAGES, run)


def changed(arrays, name, **how):
  """The arrays, one of which is wrong in one way."""
  arrays = {key: np.array(array) for key, array in arrays.items()}
  kind, number = how['kind'], how['number']
  if kind == 'missing':
    del arrays[name]
  elif kind == 'surplus':
    arrays[name.rpartition('.')[0] + '7.' + name.rpartition('.')[2]] = arrays[name]
  elif kind == 'shape':
    arrays[name] = np.concatenate([arrays[name]] * 2, axis=number % arrays[name].ndim)
  elif kind == 'rank':
    arrays[name] = arrays[name][None]
  elif kind == 'dtype':
    arrays[name] = arrays[name].astype(np.int64)
  elif kind == 'value':
    arrays[name].flat[number % arrays[name].size] = how['value']
  elif kind == 'variance':
    name = 'batch_stats.bn2.var'
    arrays[name][number % 6] = -0.5
  elif kind == 'untrained':
    for each in arrays:
      if each.startswith('batch_stats'):
        arrays[each][:] = each.endswith('var')
  return arrays, name


FAULTS = st.fixed_dictionaries({
    'kind': st.sampled_from(['missing', 'surplus', 'shape', 'rank', 'dtype', 'value', 'variance',
                             'untrained']),
    'number': st.integers(0, 50), 'value': st.sampled_from([np.nan, np.inf, -np.inf])})


def test_weights_that_do_not_fit():
  names = sorted(variables())

  def run(drawn):
    form, name, how = drawn
    with folder() as here:
      arrays, name = changed(variables(), name, **how)
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        WRITERS[form](here / form, arrays)
      layer = name.split('.')[-2]
      refused(run_main(f'--config.teacher.source={form}', '--workdir=run', kind='bare'), here, form,
              '0 and 1' if how['kind'] == 'untrained' else layer)

  generate('unfit weights', st.tuples(st.sampled_from(sorted(WRITERS)), st.sampled_from(names),
                                      FAULTS), run)


RECORDS = 'toy-test.array_record-00000-of-00001'
INFO, FEATURES = 'dataset_info.json', 'features.json'
BROKEN = st.one_of(
    st.tuples(st.sampled_from([RECORDS, INFO, FEATURES]),
              st.floats(0, 0.9).map(lambda share: ('cut', share))),
    st.tuples(st.sampled_from([RECORDS, INFO, FEATURES]),
              st.sampled_from(OTHERS).map(lambda data: ('data', data))),
    st.tuples(st.sampled_from([RECORDS, INFO, FEATURES]),
              st.sampled_from([('folder', 0), ('gone', 0), ('loop', 0)])))


def test_data_sets_that_are_damaged():

  def run(drawn):
    file, (kind, what) = drawn
    with folder() as here:
      shutil.copytree(toy_runs.data_dir(), here / 'data')
      path = next((here / 'data' / 'toy').rglob(file))
      data = path.read_bytes()
      path.unlink()
      if kind in ('cut', 'data'):
        path.write_bytes(what if kind == 'data' else data[:int(what * len(data))])
      elif kind == 'folder':
        path.mkdir()
      elif kind == 'loop':
        os.symlink(path.name, path)
      refused(run_main('--config.dataset.data_dir=data', '--workdir=run'), here, 'toy')

  generate('data sets', BROKEN, run)


def saved(array):
  stream = io.BytesIO()
  np.save(stream, array, allow_pickle=True)
  return stream.getvalue()


SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple).filter(
    lambda shape: len(shape) != 2 or shape[0] != toy_runs.CLASSES)
GOOD = np.arange(10.0).reshape(5, 2)
EMBEDDINGS = st.one_of(
    SHAPES.map(lambda shape: saved(np.random.default_rng(0).normal(size=shape))),
    st.sampled_from(['O', 'U3', 'c8', 'S2', '?', 'M8[s]']).map(
        lambda dtype: saved(GOOD.astype(int).astype(dtype))),
    st.tuples(st.integers(0, 9), st.sampled_from([np.nan, np.inf])).map(
        lambda drawn: saved(np.where(np.arange(10).reshape(5, 2) == drawn[0], drawn[1], GOOD))),
    st.floats(0, 0.99).map(lambda share: saved(GOOD)[:int(share * len(saved(GOOD)))]),
    st.sampled_from(OTHERS), st.just(saved(np.zeros((5, 3)))))


def test_embeddings_that_are_none():

  def run(data):
    with folder() as here:
      (here / 'e.npy').write_bytes(data)
      refused(run_main('--config.method.embeddings=e.npy', '--workdir=run', kind='nayer'), here,
              'embeddings')

  generate('embeddings', EMBEDDINGS, run)


def test_a_record_file_that_is_cut_in_half_is_named():
  with folder() as here:
    shutil.copytree(toy_runs.data_dir(), here / 'data')
    path = next((here / 'data' / 'toy').rglob(RECORDS))
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    refused(run_main('--config.dataset.data_dir=data', '--workdir=run'), here, "'toy'",
            'cannot be read')
