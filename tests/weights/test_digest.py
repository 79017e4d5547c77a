"""SHA-256 of files and folders of weights."""

import hashlib
import json

import pytest

from dfkd_jax.weights import digest_files

MODEL = json.dumps(
    {'weightsManifest': [{'paths': ['b.bin', 'sub/a.bin'], 'weights': []}]}).encode()
SHARDED = {'model.json': MODEL, 'b.bin': b'12', 'sub/a.bin': b'34'}


def write(folder, files):
  for name, data in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  return folder


def test_the_digest_of_a_folder_changes_with_any_name_and_content(tmp_path):
  folders = iter(range(9))
  digest = lambda files: digest_files(write(tmp_path / str(next(folders)), files))
  same = {'_METADATA': b'{}', 'd/b': b'12'}
  assert digest(same) == digest(dict(reversed(same.items())))
  others = [same | {'d/b': b'13'}, {'_METADATA': b'{}', 'd/c': b'12'}, same | {'c': b''},
            same | {'model.json': b'{}'}]
  assert len({digest(files) for files in [same, *others]}) == 5


def test_the_digest_of_a_model_covers_its_json_and_its_shards(tmp_path):
  """By hand: as sha256sum lists them, in order of their names."""
  folder = write(tmp_path / 'model', SHARDED)
  names = 'b.bin', 'model.json', 'sub/a.bin'
  lines = ''.join(f'{hashlib.sha256(SHARDED[name]).hexdigest()}  {name}\n' for name in names)
  expected = hashlib.sha256(lines.encode()).hexdigest()
  assert digest_files(folder) == digest_files(folder / 'model.json') == expected
  write(folder, {'other.bin': b'56', 'sub/b.bin': b'12', 'model.safetensors': b'78'})
  assert digest_files(folder) == digest_files(folder / 'model.json') == expected
  for name, data in {'b.bin': b'13', 'sub/a.bin': b'3', 'model.json': MODEL + b' '}.items():
    write(folder, {name: data})
    assert digest_files(folder) == digest_files(folder / 'model.json') != expected
    write(folder, {name: SHARDED[name]})
  assert digest_files(folder) == expected


def test_the_digest_of_a_model_without_a_shard_is_refused(tmp_path):
  folder = write(tmp_path / 'model', SHARDED)
  (folder / 'b.bin').unlink()
  for path in (folder, folder / 'model.json'):
    with pytest.raises(ValueError, match=rf'^Refused to read {path}: it lacks its file b\.bin\.$'):
      digest_files(path)


@pytest.mark.parametrize('text', [
    '{"weightsM', '{"weightsManifest": [5]}', '{"a":' * 5000, '{"a": 1}'], ids=range(4))
def test_the_digest_of_a_damaged_model_costs_one_line(text, tmp_path):
  (tmp_path / 'model.json').write_text(text)
  with pytest.raises(ValueError, match=rf'^(Could not|Refused to) read {tmp_path}: it [^\n]*$'):
    digest_files(tmp_path)


def test_missing_files_and_folders_without_weights(tmp_path):
  with pytest.raises(FileNotFoundError):
    digest_files(tmp_path / 'gone.pth')
  with pytest.raises(ValueError, match=rf'^Refused to read {tmp_path}: it is a folder without'):
    digest_files(tmp_path)


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_the_digest_of_a_folder_of_the_hub_covers_its_weights(name, tmp_path):
  folder = write(tmp_path / 'net', {name: b'12', 'README.md': b'a'})
  before = digest_files(folder)
  line = f'{hashlib.sha256(b"12").hexdigest()}  {name}\n'
  assert before == hashlib.sha256(line.encode()).hexdigest()
  assert digest_files(write(folder, {'README.md': b'b', 'more': b''})) == before
  assert digest_files(write(folder, {name: b'13'})) != before
