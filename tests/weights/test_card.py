"""The card of a network."""

import hashlib
import json

import toys

from dfkd_jax import weights


def test_the_card_describes_the_network(tmp_path):
  (tmp_path / 'w').write_bytes(b'some weights')
  card = weights.describe(toys.teacher(), tmp_path / 'w')
  sizes = {3 * 3 * 3 * 3, 3 * 3 * 3 * 6, 2 * (3 + 6), 6 * 5 + 5}
  assert card == weights.Card(
      source=str(tmp_path / 'w'), sha256=hashlib.sha256(b'some weights').hexdigest(),
      num_classes=5, num_params=sum(sizes), batch_norms=2, channels=9, dtype='float32',
      mean=toys.MEAN, std=toys.STD, bgr=False, resize=None)
  assert json.loads(json.dumps(card._asdict()))['mean'] == list(toys.MEAN)
  assert card.lines() == [
      f'weights     {tmp_path / "w"} (SHA-256 {card.sha256[:16]})',
      'network     296 parameters in float32, 5 classes',
      'batch norm  2 layers with 9 channels',
      'images      mean (0.5, 0.4, 0.3), std (0.25, 0.2, 0.3)']
  other = card._replace(mean=(0.25,), std=(1 / 3,), bgr=True, resize=(8, 6))
  assert other.lines()[-1] == 'images      BGR, mean (0.25), std (0.3333), resized to (8, 6)'


def test_the_card_names_a_source_that_is_no_path(tmp_path):
  (tmp_path / 'w').write_bytes(b'some weights')
  network = toys.teacher_without_batch_norm()
  card = weights.describe(network, 'embedded:w', f'{tmp_path / "w"}#ema')
  assert card.source == 'embedded:w'
  assert card.sha256 == hashlib.sha256(b'some weights').hexdigest()
  assert (card.batch_norms, card.channels, card.num_classes) == (0, 0, None)
