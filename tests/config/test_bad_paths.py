"""Refuses paths without an end, and numbers that no machine counts to."""

import os

import pytest
from refusals import folder, refused, run_main

from dfkd_jax import messages, paths
from dfkd_jax.data.prepare import __main__

VALUES = {
    'pipe': 'a pipe', 'link': 'a pipe', '/dev/zero': 'a device', '/dev/full': 'a device',
    'x' * 300: 'too long', 'a/' * 3000: 'too long',
    '~nobody_of_this_name/x': 'nobody_of_this_name', '': 'must be a path'}
FIELDS = {
    'teacher.source': '', 'judge.source': '', 'init_from.student': '', 'init_from.generator': '',
    'dataset.data_dir': '', 'compilation_cache': '', 'method.embeddings': 'nayer'}
NUMBERS = {
    'augment.student.pad=1000000000': ['augment.student.pad is 1000000000', 'must be below 12'],
    'distill.steps_per_round=3000000000': ['distill.steps_per_round is 3000000000', '2147483647'],
    'method.capacity=4000000000000': ['method.capacity is 4000000000000'],
    'method.num_steps=100000000000': ['method.num_steps is 100000000000'],
    'method.latent_dim=1000000000000': ['method.latent_dim is 1000000000000'],
    'preflight.batch_size=100000000000': ['preflight.batch_size is 100000000000'],
    'evaluate.batch_size=1000000000000': ['evaluate.batch_size is 1000000000000'],
    f'distill.rounds={"9" * 400}': ['distill.rounds is 9999', 'at most 2147483647'],
    'faults.reseed=0.5': ['faults.reseed', '0.5'],
    'dataset.image_shape[0]=5': ['dataset.image_shape[0]', 'Unknown argument'],
    f'optimizer.milestones={"-" * 3000}1': ['optimizer.milestones',
                                            '-----'],  # Pythons differ in what fails.
    f'student.name={"c" * 100_000}': ['Unknown model', 'cccc']}


@pytest.mark.parametrize('field', FIELDS)
@pytest.mark.parametrize('value', VALUES, ids=lambda value: value[:20])
def test_paths_that_lead_nowhere_are_refused_by_their_field(field, value):
  with folder() as here:
    os.mkfifo('pipe')
    os.symlink('pipe', 'link')
    more = ['--config.judge.name=convnet'] if field == 'judge.source' else []
    refused(run_main(f'--config.{field}={value}', *more, '--workdir=run', kind=FIELDS[field]), here,
            f'{field} is ', VALUES[value])


@pytest.mark.parametrize('value', [value for value in VALUES if value])
def test_paths_that_lead_nowhere_are_no_old_run(value):
  with folder() as here:
    os.mkfifo('pipe')
    os.symlink('pipe', 'link')
    refused(run_main(f'--init_from={value}', '--workdir=run'), here, 'init_from.student is ',
            VALUES[value])


@pytest.mark.parametrize('argument', NUMBERS, ids=lambda argument: argument[:40])
def test_numbers_without_measure_are_refused_by_their_field(argument):
  with folder() as here:
    refused(run_main(f'--config.{argument}', '--workdir=run'), here, *NUMBERS[argument])


def test_all_is_told_at_once_where_the_folder_is_no_path():
  with folder() as here:
    refused(run_main('--workdir=~nobody_of_this_name/x', '--config.seed=-1',
                     '--config.labels=odd'), here,
            'nobody_of_this_name', 'seed is -1', "'odd'")


def test_no_folder_is_not_the_default_one():
  with folder() as here:
    refused(run_main('--workdir='), here, "workdir is ''")


def test_a_path_is_written_out(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert paths.expand_path('~/a b/ü') == tmp_path / 'a b' / 'ü'
  assert paths.expand_path(tmp_path) == tmp_path
  assert messages.short_repr('x' * 1000) == f"'{'x' * 49} ... {'x' * 49}'"


@pytest.mark.parametrize('name', ['x' * 256, 'ü' * 128])
@pytest.mark.parametrize('parent', ['', 'missing/folder/'])
def test_names_of_more_than_255_bytes_are_refused(name, parent, tmp_path):
  with pytest.raises(ValueError, match=r'\Asource is .*, must be a path: .*too long'):
    paths.expand_path(f'{tmp_path}/{parent}{name}/file', 'source')
  assert paths.expand_path(f'{tmp_path}/{parent}{name[1:]}').name == name[1:]


@pytest.mark.parametrize('source', ['pipe', 'link', '/dev/zero', '~nobody_of_this_name/x',
                                    'x' * 300])
@pytest.mark.parametrize('what', [['arrays'], ['folder'], ['cifar10']])
def test_nothing_is_prepared_from_what_has_no_end(what, source, capsys):
  with folder() as here:
    os.mkfifo('pipe')
    os.symlink('pipe', 'link')
    refused(lambda: __main__.main([*what, '--source', source, '--data_dir', 'data']), here,
            'source is ')


@pytest.mark.parametrize('source', ['/usr/lib', '/', '/proc/self'])
def test_folders_that_hold_no_weights_are_not_read_through(source):
  with folder() as here:
    refused(run_main(f'--config.init_from.student={source}', '--workdir=run'), here,
            'init_from.student', source)
