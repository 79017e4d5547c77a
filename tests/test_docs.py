"""Every code block of README and docs/ runs, at a small size; names in the text exist.

The info string of a block says how it runs:

  python         blocks of a page share a namespace with `my_linen_module` and `my_variables`
  python FILE    is the content of FILE, in a copy of the tree
  bash           each config is checked whole; those of FastDFKD with one task, and of trainings,
                 then run with small networks and few steps
  bash sketch    cannot run here; flags, fields and files are checked
  bash set-up    as `bash`; `.ci/run` runs these two commands as they stand
  text           is no code
"""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

import doc_pages
import pytest
import toy_runs
from doc_pages import PAGES, ROOT

from dfkd_jax import train
from dfkd_jax.config.fields import BY_NAME
from dfkd_jax.data.prepare.__main__ import main as prepare_main
from dfkd_jax.runs.loop import Start

KINDS = ('python', 'bash', 'bash sketch', 'bash set-up', 'text')
WALKTHROUGH = 'adding_a_method.md'
SMALL = {  # Replaced in a page's Python, so that it takes seconds.
    'README.md': {
        'Generator(image_shape=(32, 32, 3))': 'Generator(image_shape=(32, 32, 3), width=2)',
        'num_steps=5)': 'num_steps=1, batch_size=4, sample_batch_size=6, capacity=8)',
        'range(100)': 'range(2)'},
    'how_it_works.md': {
        'models.Generator(image_shape=shape)': 'models.Generator(image_shape=shape, width=2)',
        'after=10)': 'after=0, batch_size=4, sample_batch_size=6, capacity=8)',
        "'resnet20', num_classes=10": "'convnet', num_classes=10, widths=(2, 3), strides=(2, 2)",
        'num_steps=100': 'num_steps=2', 'range(100)': 'range(2)'}}
NUM_CLASSES = {'no_real_images.md': 37}  # Of `my_linen_module`.
TINY_FLAGS = (  # For the quick start in a process of its own.
    '--config.distill.rounds=2', '--config.distill.steps_per_round=2',
    '--config.distill.batch_size=4', '--config.optimizer.warmup_steps=0',
    '--config.dataset.test_split=test[:20]')


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


@pytest.fixture
def place(tmp_path, monkeypatch):
  """The working directory, with the files and data sets that the pages name."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'data'))
  doc_pages.fill(tmp_path)
  return tmp_path


MADE = {}  # Folders and summaries of the small runs of this process, by their kind.


class CheckedRuns:
  """Replaces `train.run`: checks the whole config, then runs a small one.

  Attributes:
    only_check: Whether no small run follows.
    may_copy: Whether a small run of the same kind may be copied, if an earlier command made one.
  """

  def __init__(self, place, may_copy):
    self.only_check, self.may_copy = False, may_copy
    self._run, self._new = train.run, str(place / 'new')

  def __call__(self, config, workdir, command=None, teacher=None, *, resume=None, signals=False):
    train.check(config, Start(self._new), teacher)
    is_usual = config.method.name in (None, 'fast_dfkd') and config.method.get('num_tasks') in (
        None, 1)
    if self.only_check or not is_usual:  # jobs/test_methods.py and test_train.py run the others.
      return {}
    small, workdir = doc_pages.shrink(config), pathlib.Path(workdir).absolute()
    kind = (
        config.job, config.task, config.train.network, config.train.teacher_factor,
        config.dataset.name is None, config.judge.name is None, teacher is None)
    if not (self.may_copy and kind in MADE):
      result = self._run(small, workdir, command, teacher, resume=resume, signals=signals)
      MADE[kind] = workdir, result
    elif config.job != 'check':
      shutil.copytree(MADE[kind][0], workdir)
    return MADE[kind][1]


def by_page(pages):
  return pytest.mark.parametrize('page', pages, ids=lambda page: page.name)


@by_page([page for page in PAGES if page.name != WALKTHROUGH])
def test_blocks_run(page, place, monkeypatch):
  runs = CheckedRuns(place, may_copy=page.name != 'resuming.md')
  monkeypatch.setattr(train, 'run', runs)
  if page.name != 'own_teacher.md':  # That page prepares the set itself.
    assert prepare_main(['cifar10', '--source=cifar-10-binary.tar.gz']) == 0
  module, variables = doc_pages.tiny_network(NUM_CLASSES.get(page.name, 10))
  namespace = {'my_linen_module': module, 'my_variables': variables}
  small = SMALL.get(page.name, {})
  for old in small:
    assert page.read_text().count(old) == 1, old
  for info, text in doc_pages.blocks(page):
    assert info in KINDS, info
    if info == 'python':
      for old, new in small.items():
        text = text.replace(old, new)
      exec(compile(text, str(page), 'exec'), namespace)
    elif info.startswith('bash'):
      runs.only_check = info == 'bash sketch'
      for words in doc_pages.commands(text):
        doc_pages.run_command(words)


def test_the_walkthrough_adds_a_method(tmp_path):
  """Two files in a copy of the tree, a run and the contract test; no other file is edited."""
  tree = tmp_path / 'tree'
  tree.mkdir()
  for source in (ROOT / 'main.py', ROOT / 'setup.cfg'):
    shutil.copy(source, tree)
  for name in ('configs', 'dfkd_jax', 'tests'):
    shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns('__pycache__'))
  written = []
  for info, text in doc_pages.blocks(ROOT / 'docs' / WALKTHROUGH):
    kind, _, name = info.partition(' ')
    if kind == 'python':
      assert not (tree / name).exists()
      (tree / name).write_text(text)
      written.append(name)
      continue
    if info == 'text':  # What the commands before it print.
      continue
    assert info == 'bash'
    for words in doc_pages.commands(text):
      flags = TINY_FLAGS if words[1] == 'main.py' else ()
      done = subprocess.run(
          [sys.executable, *words[1:], *flags], cwd=tree, capture_output=True, text=True,
          timeout=600, check=False)
      assert done.returncode == 0, done.stdout + done.stderr
  method = pathlib.Path(written[0]).stem
  assert written == [f'dfkd_jax/synth/methods/{method}.py', f'configs/methods/{method}.py']
  assert (tree / 'runs' / method / 'summary.json').exists()


def test_readme_fits_on_a_screen():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= 120


def test_ci_finds_its_two_commands():
  block, = (text for info, text in doc_pages.blocks(ROOT / 'README.md') if info == 'bash set-up')
  assert len(block.splitlines()) == 2


MARKDOWN = [*PAGES, ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md']


def anchors(path):
  """Anchors of a page's headings, as GitHub makes them."""
  headings = re.findall(r'^#+ (.*)$', doc_pages.BLOCK.sub('', path.read_text()), re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@by_page(MARKDOWN)
def test_links_lead_somewhere(page):
  for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
    if target.startswith('https://'):
      continue
    name, _, anchor = target.partition('#')
    path = (page.parent / name).resolve() if name else page
    assert path.exists(), target
    assert not anchor or anchor in anchors(path), target


@by_page(MARKDOWN)
def test_names_in_the_text_exist(page):
  """Fields, modules, files and extras in inline code."""
  whole, sections = page.read_text(), {field.partition('.')[0] for field in BY_NAME if '.' in field}
  old_names = r'^\| `dfkd_jax[^|]*'  # First column of a table in CHANGELOG.
  text = re.sub(old_names, '', doc_pages.BLOCK.sub('', whole), flags=re.MULTILINE)
  for code in re.findall(r'`([^`\n]+)`', text):
    if re.fullmatch(r'dfkd_jax(\.\w+)+', code):
      assert is_in_package(code.removeprefix('dfkd_jax.')), code
    for field in re.findall(r'--config\.([\w.]+)', code):
      in_walkthrough = page.name == WALKTHROUGH and f'{field.rpartition(".")[2]}=' in whole
      assert field in BY_NAME or '.options.' in field or field == 'FIELD' or in_walkthrough, code
    if (match := re.fullmatch(r'([a-z]+)\.([a-z_.]+)(=.*)?', code)) and match[1] in sections:
      name = f'{match[1]}.{match[2]}'
      assert name in BY_NAME or name.endswith('.safetensors') or is_in_package(name), code
    for path in re.findall(r'(?:dfkd_jax|configs|tests|benchmarks|docs|colabs)/[\w./*-]+', code):
      assert list(ROOT.glob(path.rstrip('/'))) or '<' in code, code
    if 'pip install' in code or code.startswith("'.["):
      doc_pages.check_extras(code)


def is_in_package(name):
  """Whether `dfkd_jax.NAME` is a module or an attribute of one."""
  package, _, last = f'dfkd_jax.{name}'.rpartition('.')
  try:
    return hasattr(importlib.import_module(package), last) or bool(
        importlib.util.find_spec(f'dfkd_jax.{name}'))
  except ImportError:
    return False
