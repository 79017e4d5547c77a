"""CuDFKD. arXiv:2208.13648; for CIFAR the numbers of the published scripts.

An epoch is a round: 40 calls of one generator step, each followed by 10 student steps. Pairs
without a script take the one of their teacher's kind.

Cost: 250 to 500 rounds of 400 student steps on 512 to 1,024 fresh images. CIFAR-10: ResNet-34 to
ResNet-18 290 PFLOP, WRN-40-2 to WRN-16-1 85; CIFAR-100: 2.4 and 2 times that. The paper says that
ResNet-18 reaches 90 % of CIFAR-10 within 15 rounds.
Samples are weighed one by one, as in the paper. The code of its results weighs batches:
--config.method.per=batch. The second number of CIFAR-100 is from a ramp between 1/4 and 2/3 of the
rounds.
Published (best epoch), R34-R18, V11-R18, W40-2-W40-1, W40-2-W16-2, W40-2-W16-1:
  CIFAR-10 95.28 91.61 93.18 92.98 88.77, CIFAR-100 75.97 71.22 66.74 66.26 -
Command: python main.py --config=configs/cifar10.py:cu_dfkd,resnet34-resnet18 --workdir=...
  --config.teacher.source=...
"""

from configs import common, online

CALLS = 40
# By number of classes and whether the teacher is a WRN: batch, rounds, T, divergence, first
# threshold and its growth, first adversarial factor and slope, shares of the rounds of its rise.
SCRIPTS = {
    (10, False): (512, 250, 20.0, 'l1', 2.0, 1e-4, 0.0, 0.5, 0.25, 0.75),
    (10, True): (1024, 250, 20.0, 'kl', 2.0, 1e-4, 0.5, 0.05, 0.25, 0.75),
    (100, False): (768, 400, 5.0, 'l1', 1.0, 2e-5, 0.0, 0.35, 0.2, 0.8),
    (100, True): (1024, 500, 2.0, 'kl', 1.0, 2e-5, 0.0, 0.12, 0.2, 0.75),
}


def cifar(config):
  """Sets the published numbers for the pair and the data set of the config."""
  script = SCRIPTS[config.dataset.num_classes, config.teacher.name.startswith('wrn')]
  (batch_size, rounds, temperature, divergence, threshold, growth, first, slope, begin,
   end) = script
  config.method.update(
      name='cu_dfkd', num_steps=1, latent_dim=512, generator_lr=1e-3,
      generator_schedule='constant', adam_b1=0.9, adam_b2=0.99, sample_by='running', init_std=0.02,
      batch_size=batch_size, num_tasks=1, curriculum_kind='log', threshold_start=threshold,
      threshold_growth=growth, per='sample', balance_temperature=temperature,
      adversary=dict(divergence='kl', temperature=3.0, masked=True),
      adversarial=dict(init_value=first, slope=slope, begin=int(begin * rounds),
                       end=int(end * rounds), every=CALLS), **common.averaged())
  config.generator.update(name='generator', options=dict(width=64, stem_width=256))
  # The ramp replaces the adversarial factor.
  config.factors.update(batch_norm=1.0, one_hot=1.0, balance=20.0, adversarial=1.0)
  config.augment.student.name = 'none'
  config.distill.update(
      rounds=rounds, calls_per_round=CALLS, steps_per_round=400, distill_after=0,
      batch_size=batch_size, temperature=temperature, divergence=divergence)
  config.optimizer.update(name='sgd', learning_rate=0.1, momentum=0.9, weight_decay=1e-4,
                          schedule='cosine_by_round', end_value=0.0)


def camvid(config):
  """Sets numbers for CamVid on a CPU."""
  online.camvid(config, 'cu_dfkd', relative_batch_norm=1.0, one_hot=0.5, balance=0.5,
                adversarial=1.0)
  rounds = config.distill.rounds
  growth = 16 / (rounds * config.distill.steps_per_round)  # from 2 to 18 within the run
  config.method.update(
      curriculum_kind='log', threshold_start=2.0, threshold_growth=growth, balance_temperature=1.0,
      adversary=dict(divergence='kl', temperature=3.0, masked=True),
      adversarial=dict(init_value=0.0, slope=0.05, begin=rounds // 4, end=rounds * 3 // 4, every=5))


def quickstart(config):
  """Sets numbers for the quick start."""
  online.quickstart(
      config, 'cu_dfkd', calls=4, batch_norm=10.0, one_hot=1.0, balance=20.0, adversarial=1.0)
  config.method.update(
      curriculum_kind='log', threshold_start=2.0, threshold_growth=1e-3, balance_temperature=4.0,
      adversary=dict(divergence='kl', temperature=3.0, masked=True),
      adversarial=dict(init_value=0.0, slope=0.05, begin=60, end=180, every=4))
