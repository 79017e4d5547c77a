"""The student's head in a run: fitted once, in closed form, on images that the method gives."""

import time

import jax

from dfkd_jax import distill, parallel, report
from dfkd_jax.config import head as head_settings
from dfkd_jax.config.records import Head, Settings
from dfkd_jax.jobs import samples
from dfkd_jax.models.network import Network
from dfkd_jax.runs.loop import Event, Experiment
from dfkd_jax.runs.programs import Plan, State
from dfkd_jax.spline.head_init import fit_head
from dfkd_jax.types import PRNGKey


def replaced_layers(head: Head, student: Network) -> tuple[str, ...]:
  """Returns the layers that the run will replace; empty if the head is random."""
  if head.init == 'random':
    return ()
  return head_settings.layer_names(student.module, head.init)


def events(
    experiment: Experiment, plan: Plan, settings: Settings, teacher: Network) -> list[Event]:
  """Returns the event that fits the head, if there is one.

  It maps the student's features, in evaluation mode, to the teacher's logits. Nothing but the head
  changes, and of the optimizer's state the part of the head. The record of the fit is saved with
  the run, under 'head'.
  """
  head, store = settings.head, experiment.store
  record = store.meta['head'] = store.stored.get('head')
  if head.init == 'random':
    return []
  index = head_settings.fit_round(head, settings.distill)
  if record is not None and head.round is None:
    index = record['round']  # a run that is made longer does not fit it again

  def replace_head(state: State, key: PRNGKey) -> State:
    began = time.perf_counter()
    with experiment.ledger.part('head'):
      fitted = _fit(plan, settings, teacher, state, key)
      state = _with_head(plan, head, state, fitted.params)
    store.meta['head'] = {
        'init': head.init, 'round': index, 'images': head.images, 'terms': fitted.num_terms,
        'seconds': time.perf_counter() - began}
    report.note(f'Fitted the head of the student before round {index + 1}: {head.init}, '
                f'{fitted.num_terms} terms, {head.images} images.')
    return state

  return [(index, replace_head)]


def _fit(plan, settings, teacher, state, key):
  """Fits a head to images of the method; the same on all processes but for rounding."""
  head, (draw_key, fit_key) = settings.head, jax.random.split(key)
  features, logits = samples.draw(
      plan, state.synthesis, draw_key, head.images, _features_and_logits, teacher,
      state.student.network)
  with parallel.raise_on_all_processes():
    return fit_head(head.init, features[:head.images], logits[:head.images], head.width, fit_key,
                    is_centred=settings.distill.divergence == 'kl')


def _features_and_logits(images, teacher, student):
  return student(images).features, teacher(images).logits


def _with_head(plan, head, state, params):
  """The state with the parameters in the student's head, and the optimizer's state reset there."""
  # Of the first process, since libraries of linear algebra round differently on other hosts.
  layers = jax.tree.map(lambda leaf: parallel.gather_processes(leaf)[0], params)
  names = replaced_layers(head, state.student.network)
  student = distill.replace_layers(
      jax.device_get(parallel.local_copy(state.student)),
      {name: layers[f'Dense_{i}'] for i, name in enumerate(names)}, plan.tx)
  return state.replace(student=parallel.place(plan.mesh, student))
