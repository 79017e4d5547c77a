"""CMI against the numbers of the published code, in float64.

It compares losses, generator, head, bank and the images kept.

Those runs had no re-initialisation of the generator, so it goes on from call to call.
"""

import jax
import numpy as np
import toys
from conftest import golden
from golden_networks import (
  BLOCKS,
  below,
  cast,
  check_formula,
  check_images,
  filled,
  formula_network,
  formula_reference,
  labels_of,
  parameters,
  program,
  sequence,
  torch_layout,
  wide_resnet,
)

from dfkd_jax import augment, models, synth, weights
from dfkd_jax.synth.methods.cmi import Head

NUMBERS = dict(
    meta='sequential', num_steps=2, generator_lr=1e-3, latent_lr=1e-3, contrast_temperature=0.2,
    factors=synth.Factors(batch_norm=1.0, one_hot=1.0, adversarial=0.5, contrast=0.8),
    augment=augment.identity)
TERMS = {'loss': 'total', 'batch_norm': 'bn', 'one_hot': 'oh', 'adversarial': 'adv',
         'contrast': 'cr'}


def first_rows(key, size, capacity, number):
  """The published run's order: the bank's first rows."""
  del key, capacity
  return np.arange(number), np.arange(number) < size


def check_all(params, archive, prefix):
  reference, found = below(archive, prefix), torch_layout(params)
  assert found
  for key, value in found.items():
    np.testing.assert_allclose(value, reference[key], rtol=1e-9, atol=1e-11, err_msg=prefix + key)


def test_two_published_calls(x64):
  """The first with an empty bank, the second with the images of the first."""
  archive, start = golden('cmi'), below(golden('fast_g0'), 'g0/')
  teacher, student = cast(wide_resnet('teacher_wrn16_1')), cast(wide_resnet('student_wrn16_1'))
  generator = models.Generator(image_shape=(32, 32, 3), width=4)
  make = lambda latents, targets: synth.create(
      'cmi', generator=generator, image_shape=(32, 32, 3), latent_dim=16, task=labels_of(targets),
      batch_size=8, sample_batch_size=8, capacity=16, bank_size=32, num_negatives=8,
      projection_size=16,
      # The inputs of the third group and of the last batch norm.
      feature_layers=('block3_layer_0/bn1', 'bn1'),
      local_view=lambda _, images: images[:, :, ::-1], sample_rows=first_rows,
      sample_latents=lambda *_: latents, **NUMBERS)
  state = toys.jit(make(None, None).init)(jax.random.key(0), teacher)
  state = state.replace(
      inversion=state.inversion.replace(meta_params=parameters(start, generator, (16,), start)),
      head=cast(weights.to_variables(below(archive, 'head0/'), Head(16), (96,))['params']),
      bank=cast(archive['bank0'].reshape(1, 32, 2, 96)))
  synthesize = program(make)

  for call in (1, 2):
    targets = np.sort(archive['targets_before_sort'][call - 1])
    state, metrics = synthesize(state, cast(archive['z'][call - 1]), targets, teacher, student)
    columns = dict(zip(
        archive['loss_columns'].tolist(), archive[f'call{call}/loss_f64'].T, strict=True))
    assert set(metrics) == set(TERMS)
    for name, short in TERMS.items():
      np.testing.assert_allclose(
          metrics[name], columns[short], rtol=1e-9, err_msg=f'{name} of call {call}')
    check_all(state.inversion.meta_params, archive, f'call{call}/gen_after_f64/')
    check_all(state.head, archive, f'call{call}/head_after_f64/')
    bank = np.asarray(state.bank).reshape(32, 192)
    np.testing.assert_allclose(
        bank[:8 * call], archive[f'call{call}/bank_f64'][:8 * call], rtol=1e-9, atol=1e-11)
    # Untouched rows were float32.
    np.testing.assert_allclose(bank, archive[f'call{call}/bank_f64'], rtol=1e-6)
    assert (int(state.next), int(state.size)) == (8 * call, 8 * call)
    check_images(
        np.asarray(state.inversion.buffer.images[0, 8 * call - 8:8 * call]),
        archive[f'call{call}/best_f64'])
  assert synthesize._cache_size() == 1


def test_the_run_whose_weights_are_a_formula(x64):
  """The features are those of all batch norms.

  Calls draw all live rows, so that the order of the rows does not matter.
  """
  reference = formula_reference()['cmi']
  teacher, student = formula_network((6, 8), 0), formula_network((4, 5), 6)
  generator = models.Generator(image_shape=(8, 8, 3), width=2)
  make = lambda latents, targets: synth.create(
      'cmi', generator=generator, image_shape=(8, 8, 3), latent_dim=4,
      task=labels_of(targets)._replace(num_classes=4), batch_size=6, sample_batch_size=6,
      capacity=12, bank_size=24, num_negatives=12, projection_size=4, local_view=augment.identity,
      sample_latents=lambda *_: latents, **NUMBERS)
  state = toys.jit(make(None, None).init)(jax.random.key(0), teacher)
  state = state.replace(
      inversion=state.inversion.replace(meta_params=filled(generator, (4,), BLOCKS, 3)['params']),
      head=filled(Head(4), (14,), ('head_0', 'head_2'), 80)['params'])
  synthesize = program(make)

  for index, call in enumerate(reference['calls']):
    latents = cast(sequence((6, 4), 50 + index, 1.0))
    state, metrics = synthesize(state, latents, np.array([0, 0, 1, 1, 2, 3]), teacher, student)
    np.testing.assert_allclose(
        metrics['loss'], call['total'], rtol=1e-9, err_msg=f'call {index + 1}')
  check_formula(state.inversion.meta_params, reference['gen'])
  check_formula(state.head, reference['head'])
