"""Where weights come from: paths, and the hub with a stand-in for its library."""

import json
import sys
import types

import pytest

from dfkd_jax.models import pretrained


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
  assert pretrained.resolve(str(tmp_path / 'w.pth')) == tmp_path / 'w.pth'
  assert pretrained.resolve(tmp_path) == tmp_path
  assert pretrained.resolve(f'{tmp_path}/w.pth#ema') == tmp_path / 'w.pth#ema'
  monkeypatch.setenv('HOME', str(tmp_path))
  assert pretrained.resolve('~/w.pth') == tmp_path / 'w.pth'


@pytest.mark.parametrize(('source', 'message'), [
    ('gone.pth', r"^'gone\.pth': there is no such file or folder\.$"),
    ('gone.pth#ema', r"^'gone\.pth#ema': there is no such file"),
    ('https://example.org/w.pth', '^.* is an address: download the file'),
    ('hf:only', r'^.hf:only. must be hf:OWNER/REPO\[@REVISION\]\[/FILE\]\.$'), ('hf:a/b@/c', 'must be hf:OWNER/REPO')])
def test_sources_that_name_nothing_are_refused(source, message):
  with pytest.raises(ValueError, match=message):
    pretrained.resolve(source)


@pytest.mark.parametrize(('source', 'files', 'name', 'revision'), [
    ('hf:timm/net.a1', ['README.md', 'pytorch_model.bin', 'model.safetensors'], 'model.safetensors', None),
    ('hf:timm/net.a1@v2', ['README.md', 'pytorch_model.bin', 'other.pth'], 'pytorch_model.bin', 'v2'),
    ('hf:timm/net.a1', ['config.json', 'sub/weights.h5'], 'sub/weights.h5', None),
    ('hf:timm/net.a1@v2/sub/x.pth', [], 'sub/x.pth', 'v2')])
def test_a_file_of_the_hub_is_chosen(source, files, name, revision, hub, tmp_path):
  fake = hub(files)
  assert pretrained.resolve(source) == tmp_path / name
  assert fake.asked[-1] == ('timm/net.a1', name, revision)
  assert fake.asked[:-1] == ([('timm/net.a1', revision)] if files else [])
  assert pretrained.resolve(f'{source}#ema') == tmp_path / f'{name}#ema'


@pytest.mark.parametrize(('source', 'name', 'files'), [
    ('hf:a/b@v2', 'model.json', ['README.md', 'model.json', 'shard1of2', 'shard2of2']),
    ('hf:a/b@v2/sub/net.json', 'sub/net.json', [])])
def test_a_model_of_tensorflow_js_comes_with_the_files_that_it_names(source, name, files, hub, tmp_path):
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  groups = [{'paths': [f'shard{number}of2'], 'weights': []} for number in (1, 2)]
  path.write_text(json.dumps({'weightsManifest': groups}))
  fake = hub(files)
  assert pretrained.resolve(source) == path
  place = name.rpartition('/')[0] and 'sub/'
  assert fake.asked[-3:] == [('a/b', file, 'v2') for file in (name, f'{place}shard1of2', f'{place}shard2of2')]
  path.write_text('{"a": 1}')
  with pytest.raises(ValueError, match=f"^'{name}' of 'a/b' is JSON, but has no weightsManifest"):
    pretrained.resolve(source)


@pytest.mark.parametrize(('files', 'message'), [
    (['README.md', 'model.onnx'], 'has no files of weights; name one'),
    (['b.pth', 'a.bin', 'x.txt'], r'has 2 files of weights: a\.bin, b\.pth; name one as hf:OWNER/REPO/FILE')])
def test_a_repository_without_one_file_of_weights_is_refused(files, message, hub):
  hub(files)
  with pytest.raises(ValueError, match=f"^'hf:timm/net' {message}"):
    pretrained.resolve('hf:timm/net')


@pytest.mark.parametrize('source', ['hf:timm/net', 'hf:timm/net/w.bin'])
def test_what_the_hub_says_is_told_in_one_line(source, hub):
  hub(error=ConnectionError('\n\nNo connection.\nSome more.\n'))
  with pytest.raises(ValueError, match=f"^'{source}' cannot be fetched: No connection.$"):
    pretrained.resolve(source)


def test_without_a_connection_the_file_kept_before_is_taken(hub, tmp_path):
  hub(error=ConnectionError('No connection.'), cached=['pytorch_model.bin'])
  assert pretrained.resolve('hf:timm/net') == tmp_path / 'pytorch_model.bin'


def test_without_the_library_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match=r"^'hf:timm/net' needs huggingface_hub: pip install 'dfkd_jax\[hf\]'\.$"):
    pretrained.resolve('hf:timm/net')


def test_the_real_library_offline(monkeypatch, tmp_path):
  constants = pytest.importorskip('huggingface_hub.constants')
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  for source in ('hf:timm/net', 'hf:timm/net/w.bin', 'hf:timm/-bad--name.git'):
    with pytest.raises(ValueError, match=rf"^'{source}' cannot be fetched: [^\n]+$"):
      pretrained.resolve(source)
