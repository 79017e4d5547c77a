"""Where weights come from: paths, and the hub with a stand-in for its library."""

import fnmatch
import json
import sys
import types

import pytest

from dfkd_jax import weights


class Hub(types.ModuleType):
  """Stands for huggingface_hub with one repository. Files lie in `folder` once downloaded."""

  def __init__(self, folder, files=(), error=None, cached=()):
    super().__init__('huggingface_hub')
    self.folder, self.files, self.error, self.cached = folder, files, error, cached
    self.repos, self.downloads = [], []

  def list_repo_files(self, repo, *, revision=None):
    self.repos.append((repo, revision))
    if self.error:
      raise self.error
    return list(self.files)

  def snapshot_download(self, repo, *, revision=None, allow_patterns=()):
    self.repos.append((repo, revision))
    names = [name for name in (self.cached if self.error else self.files)
             if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)]
    if self.error and not names:
      raise self.error
    for name in names:
      (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
      (self.folder / name).touch()
    self.downloads += names
    return str(self.folder)

  def try_to_load_from_cache(self, repo, filename, *, revision=None):
    return str(self.folder / filename) if filename in self.cached else None


@pytest.fixture
def make_hub(tmp_path, monkeypatch):
  def make(*arguments, **options):
    hub = Hub(tmp_path, *arguments, **options)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    return hub
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
    ('hf:only', r'^.hf:only., must be hf:OWNER/REPO\[@REVISION\]\[/FILE\]\.$'),
    ('hf:a/b@/c', 'must be hf:OWNER/REPO')])
def test_sources_that_name_nothing_are_refused(source, message):
  with pytest.raises(ValueError, match=message):
    weights.resolve(source)


@pytest.mark.parametrize(('source', 'files', 'name', 'revision'), [
    ('hf:timm/net.a1', ['README.md', 'pytorch_model.bin', 'model.safetensors'],
     'model.safetensors', None),
    ('hf:timm/net.a1@v2', ['README.md', 'pytorch_model.bin', 'other.pth'],
     'pytorch_model.bin', 'v2'),
    ('hf:timm/net.a1', ['config.json', 'sub/weights.h5'], 'sub/weights.h5', None),
    ('hf:timm/net.a1@v2/sub/x.pth', ['w.pth', 'sub/x.pth'], 'sub/x.pth', 'v2'),
    ('hf:timm/net.a1/x[1].pth', ['x1.pth', 'x[1].pth'], 'x[1].pth', None)])
def test_one_file_of_the_hub_is_downloaded(source, files, name, revision, make_hub, tmp_path):
  hub = make_hub(files)
  assert weights.resolve(source) == tmp_path / name
  assert set(hub.repos) == {('timm/net.a1', revision)}
  assert hub.downloads == [name]
  assert weights.resolve(f'{source}#ema') == tmp_path / f'{name}#ema'


SHARDS = ['group1-shard1of2.bin', 'group1-shard2of2.bin']


def write_model(path, shards=SHARDS):
  """A model.json that names these shards, in two groups."""
  path.parent.mkdir(exist_ok=True)
  manifest = [{'paths': [name], 'weights': []} for name in shards]
  path.write_text(json.dumps({'weightsManifest': manifest}))


@pytest.mark.parametrize('folder', ['', 'sub/'])
def test_a_model_of_tensorflow_js_comes_with_its_shards(folder, make_hub, tmp_path):
  names = [f'{folder}{name}' for name in ('model.json', *SHARDS)]
  write_model(tmp_path / names[0])
  for source in ('hf:timm/net@v2', f'hf:timm/net@v2/{names[0]}'):
    hub = make_hub(['README.md', 'config.json', *names])
    assert weights.resolve(source) == tmp_path / names[0]
    assert hub.downloads == names
    assert set(hub.repos) == {('timm/net', 'v2')}


def test_a_json_may_have_any_name(make_hub, tmp_path):
  write_model(tmp_path / 'resnet.json', ['parts/a', './b'])
  hub = make_hub(['resnet.json', 'parts/a', 'b', 'c'])
  assert weights.resolve('hf:timm/net/resnet.json') == tmp_path / 'resnet.json'
  assert hub.downloads == ['resnet.json', 'parts/a', 'b']


@pytest.mark.parametrize(('files', 'chosen'), [
    (['model.json', *SHARDS, 'pytorch_model.bin'], 'pytorch_model.bin'),
    (['model.json', *SHARDS, 'w.h5'], r'has 2 files of weights: model\.json, w\.h5; name one'),
    (['README.md', 'model.onnx'], 'has no files of weights; name one'),
    (['b.pth', 'a.bin', 'x.txt'], r'has 2 files of weights: a\.bin, b\.pth; name one as hf:OWNER')])
def test_one_file_of_weights_is_chosen_or_none(files, chosen, make_hub, tmp_path):
  make_hub(files)
  if chosen in files:
    assert weights.resolve('hf:timm/net') == tmp_path / chosen
  else:
    with pytest.raises(ValueError, match=f"^'hf:timm/net' {chosen}"):
      weights.resolve('hf:timm/net')


@pytest.mark.parametrize(('text', 'message'), [
    ('{"weightsManifest": [{"paths": ["../b"]}]}',
     r"names '\.\./b', which lies outside of its folder"),
    ('{"a": 1}', 'is JSON, but has no weightsManifest'), ('{"weights', 'cannot be fetched'),
    ('{"weightsManifest": [{"paths": ["b"]}]}', "has no file 'b'")])
def test_json_without_shards_is_refused(text, message, make_hub, tmp_path):
  (tmp_path / 'model.json').write_text(text)
  hub = make_hub(['model.json'])
  with pytest.raises(ValueError, match=rf"^'hf:timm/net/model\.json' {message}[^\n]*$"):
    weights.resolve('hf:timm/net/model.json')
  assert hub.downloads == ['model.json']


def test_a_file_that_the_repository_lacks_is_named(make_hub):
  make_hub(['a.pth'])
  with pytest.raises(ValueError, match=r"^'hf:timm/net/b\.pth' has no file 'b\.pth'"):
    weights.resolve('hf:timm/net/b.pth')


@pytest.mark.parametrize('source', ['hf:timm/net', 'hf:timm/net/w.bin'])
def test_errors_of_the_hub_are_told_in_one_line(source, make_hub):
  make_hub(error=ConnectionError('\n\nNo connection.\nSome more.\n'))
  with pytest.raises(ValueError, match=f"^'{source}' cannot be fetched: No connection.$"):
    weights.resolve(source)


def test_without_a_connection_the_cache_is_used(make_hub, tmp_path):
  make_hub(error=ConnectionError('No connection.'), cached=['pytorch_model.bin'])
  assert weights.resolve('hf:timm/net') == tmp_path / 'pytorch_model.bin'
  write_model(tmp_path / 'model.json')
  make_hub(error=ConnectionError('No connection.'), cached=['model.json', *SHARDS])
  assert weights.resolve('hf:timm/net') == tmp_path / 'model.json'
  (tmp_path / SHARDS[1]).unlink()
  make_hub(error=ConnectionError('No connection.'), cached=['model.json', SHARDS[0]])
  with pytest.raises(ValueError, match=f"has no file '{SHARDS[1]}'"):
    weights.resolve('hf:timm/net')


def test_without_the_library_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match=r"^'hf:timm/net' needs huggingface_hub: pip install 'dfkd_"):
    weights.resolve('hf:timm/net')


@pytest.fixture
def real_library(monkeypatch, tmp_path):
  constants = pytest.importorskip('huggingface_hub.constants')
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  return tmp_path


@pytest.mark.parametrize('source', ['hf:timm/net', 'hf:timm/net/w.bin', 'hf:timm/-bad--name.git'])
def test_the_real_library_offline(source, real_library):
  with pytest.raises(ValueError, match=rf"^'{source}' cannot be fetched: [^\n]+$"):
    weights.resolve(source)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.json'])
def test_the_real_library_with_a_cache(name, real_library):
  """Laid out as the library keeps a repository."""
  folder = real_library / 'models--timm--net'
  (folder / 'refs').mkdir(parents=True)
  (folder / 'refs' / 'main').write_text('f' * 40)
  snapshot = folder / 'snapshots' / ('f' * 40)
  snapshot.mkdir(parents=True)
  (snapshot / name).write_text('')
  if name == 'model.json':
    write_model(snapshot / name)
    for shard in SHARDS:
      (snapshot / shard).write_text('')
  assert weights.resolve('hf:timm/net') == snapshot / name
  assert weights.resolve(f'hf:timm/net/{name}') == snapshot / name
