"""Where weights come from: paths, and the hub with a stand-in for its library."""

import json
import sys
import types

import pytest

from dfkd_jax import weights


class Hub(types.ModuleType):
  """Answers for one repository, and notes what is asked."""

  def __init__(self, folder, files, error=None, cached=()):
    super().__init__('huggingface_hub')
    self.folder, self.files, self.error, self.cached, self.asked = folder, files, error, cached, []

  def list_repo_files(self, repo, *, revision=None):
    self.asked.append((repo, revision))
    if self.error:
      raise self.error
    return list(self.files)

  def hf_hub_download(self, repo, filename, *, revision=None):
    self.asked.append((repo, filename, revision))
    if self.error:
      raise self.error
    return str(self.folder / filename)

  def try_to_load_from_cache(self, repo, filename, *, revision=None):
    return str(self.folder / filename) if filename in self.cached else None


@pytest.fixture
def hub(tmp_path, monkeypatch):
  def make(files=(), **options):
    found = Hub(tmp_path, files, **options)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', found)
    return found
  return make


def test_paths_of_files_and_folders(tmp_path, monkeypatch):
  (tmp_path / 'w.pth').write_bytes(b'x')
  assert weights.resolve(str(tmp_path / 'w.pth')) == tmp_path / 'w.pth'
  assert weights.resolve(tmp_path) == tmp_path
  assert weights.resolve(f'{tmp_path}/w.pth#ema') == tmp_path / 'w.pth#ema'
  monkeypatch.setenv('HOME', str(tmp_path))
  assert weights.resolve('~/w.pth') == tmp_path / 'w.pth'


@pytest.mark.parametrize(('source', 'message'), [
    ('gone.pth', r"^'gone\.pth': there is no such file or folder\.$"),
    ('gone.pth#ema', r"^'gone\.pth#ema': there is no such file"),
    ('https://example.org/w.pth', '^.*, an address: download the file'),
    ('hf:only', r'^.hf:only., must be hf:OWNER/REPO\[@REVISION\]\[/FILE\]\.$'), ('hf:a/b@/c', 'must be hf:OWNER/REPO')])
def test_sources_that_name_nothing_are_refused(source, message):
  with pytest.raises(ValueError, match=message):
    weights.resolve(source)


@pytest.mark.parametrize(('source', 'files', 'name', 'revision'), [
    ('hf:timm/net.a1', ['README.md', 'pytorch_model.bin', 'model.safetensors'], 'model.safetensors', None),
    ('hf:timm/net.a1@v2', ['README.md', 'pytorch_model.bin', 'other.pth'], 'pytorch_model.bin', 'v2'),
    ('hf:timm/net.a1', ['config.json', 'sub/weights.h5'], 'sub/weights.h5', None),
    ('hf:timm/net.a1@v2/sub/x.pth', [], 'sub/x.pth', 'v2')])
def test_a_file_of_the_hub_is_chosen(source, files, name, revision, hub, tmp_path):
  fake = hub(files)
  assert weights.resolve(source) == tmp_path / name
  assert fake.asked[-1] == ('timm/net.a1', name, revision)
  assert fake.asked[:-1] == ([('timm/net.a1', revision)] if files else [])
  assert weights.resolve(f'{source}#ema') == tmp_path / f'{name}#ema'


SHARDS = ['group1-shard1of2.bin', 'group1-shard2of2.bin']


def write_model(path, shards=SHARDS):
  """A model.json that names these shards, in two groups."""
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps({'weightsManifest': [{'paths': [name], 'weights': []} for name in shards]}))


@pytest.mark.parametrize('folder', ['', 'sub/'])
def test_a_model_of_tensorflow_js_comes_with_its_shards(folder, hub, tmp_path):
  names = [f'{folder}{name}' for name in ('model.json', *SHARDS)]
  write_model(tmp_path / names[0])
  fake = hub(['README.md', 'config.json', *names])
  assert weights.resolve('hf:timm/net@v2') == tmp_path / names[0]
  assert fake.asked[0] == ('timm/net', 'v2')
  assert fake.asked[-3:] == [('timm/net', name, 'v2') for name in names]
  fake.asked.clear()
  assert weights.resolve(f'hf:timm/net@v2/{names[0]}') == tmp_path / names[0]
  assert fake.asked == [('timm/net', name, 'v2') for name in names]


def test_a_json_may_have_any_name(hub, tmp_path):
  write_model(tmp_path / 'resnet.json', ['parts/a', './b'])
  fake = hub()
  assert weights.resolve('hf:timm/net/resnet.json') == tmp_path / 'resnet.json'
  assert fake.asked == [('timm/net', name, None) for name in ('resnet.json', 'parts/a', 'b')]


@pytest.mark.parametrize(('files', 'chosen'), [
    (['model.json', *SHARDS, 'pytorch_model.bin'], 'pytorch_model.bin'),
    (['model.json', *SHARDS, 'w.h5'], r'has 2 files of weights: model\.json, w\.h5; name one'),
    (['model.json', *SHARDS, 'shard3.bin'], r'has 2 files of weights: model\.json, shard3\.bin; name one'),
    (['model.json', *SHARDS, 'sub/model.json', 'sub/x.bin'],
     r'has 2 files of weights: model\.json, sub/model\.json; name one'),
    (['other/model.json', 'w.h5'], 'w.h5')])
def test_a_model_of_tensorflow_js_is_one_file_of_weights_among_others(files, chosen, hub, tmp_path):
  write_model(tmp_path / 'model.json')
  write_model(tmp_path / 'sub' / 'model.json', ['x.bin'])
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'model.json').write_text('{"is": "another kind"}')
  hub(files)
  if chosen in files:
    assert weights.resolve('hf:timm/net') == tmp_path / chosen
  else:
    with pytest.raises(ValueError, match=f"^'hf:timm/net' {chosen}"):
      weights.resolve('hf:timm/net')


@pytest.mark.parametrize(('text', 'message'), [
    ('{"weightsManifest": [{"paths": ["../b"]}]}', r"names '\.\./b', which lies outside of its folder"),
    ('{"a": 1}', 'is JSON, but has no weightsManifest'), ('{"weightsManifest": [{}]}', 'is truncated or damaged'),
    ('{"weights', 'is truncated or damaged'), ('{"weightsManifest": [{"paths": [5]}]}', 'is truncated or damaged')])
def test_json_that_names_no_shards_is_refused(text, message, hub, tmp_path):
  (tmp_path / 'model.json').write_text(text)
  fake = hub()
  with pytest.raises(ValueError, match=rf"^'hf:timm/net/model\.json' {message}[^\n]*\.$"):
    weights.resolve('hf:timm/net/model.json')
  assert fake.asked == [('timm/net', 'model.json', None)]


@pytest.mark.parametrize(('files', 'message'), [
    (['README.md', 'model.onnx'], 'has no files of weights; name one'),
    (['b.pth', 'a.bin', 'x.txt'], r'has 2 files of weights: a\.bin, b\.pth; name one as hf:OWNER/REPO/FILE')])
def test_a_repository_without_one_file_of_weights_is_refused(files, message, hub):
  hub(files)
  with pytest.raises(ValueError, match=f"^'hf:timm/net' {message}"):
    weights.resolve('hf:timm/net')


@pytest.mark.parametrize('source', ['hf:timm/net', 'hf:timm/net/w.bin'])
def test_what_the_hub_says_is_told_in_one_line(source, hub):
  hub(error=ConnectionError('\n\nNo connection.\nSome more.\n'))
  with pytest.raises(ValueError, match=f"^'{source}' cannot be fetched: No connection.$"):
    weights.resolve(source)


def test_without_a_connection_the_file_kept_before_is_taken(hub, tmp_path):
  hub(error=ConnectionError('No connection.'), cached=['pytorch_model.bin'])
  assert weights.resolve('hf:timm/net') == tmp_path / 'pytorch_model.bin'


def test_without_a_connection_a_model_is_taken_with_all_its_shards(hub, tmp_path):
  write_model(tmp_path / 'model.json')
  hub(error=ConnectionError('No connection.'), cached=['model.json', *SHARDS])
  assert weights.resolve('hf:timm/net') == tmp_path / 'model.json'
  hub(error=ConnectionError('No connection.'), cached=['model.json', SHARDS[0]])
  with pytest.raises(ValueError, match=r'cannot be fetched: No connection\.$'):
    weights.resolve('hf:timm/net')


def test_without_the_library_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match=r"^'hf:timm/net' needs huggingface_hub: pip install 'dfkd_jax\[hf\]'\.$"):
    weights.resolve('hf:timm/net')


def test_the_real_library_offline(monkeypatch, tmp_path):
  constants = pytest.importorskip('huggingface_hub.constants')
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  for source in ('hf:timm/net', 'hf:timm/net/w.bin', 'hf:timm/-bad--name.git'):
    with pytest.raises(ValueError, match=rf"^'{source}' cannot be fetched: [^\n]+$"):
      weights.resolve(source)
