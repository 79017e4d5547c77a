"""Errors of Orbax and of the disk: one line each, and told apart from damage."""

import pytest

from dfkd_jax.runs import checkpoint_format

FULL = 'RESOURCE_EXHAUSTED: Error writing "a/b/0" in OCDBT database: No space left on device'


@pytest.mark.parametrize(('error', 'is_transient'), [
    (ValueError('DATA_LOSS: Error decoding'), False), (ValueError(FULL), True),
    (MemoryError(), True),
    (OSError('[Errno 13] Permission denied'), True),
    (ValueError('NOT_FOUND: no such file'), False)])
def test_transient_errors(error, is_transient):
  reading = checkpoint_format.storage_errors('read step 3', checkpoint_format.DamagedError)
  with pytest.raises(ValueError, match=r'^Cannot read step 3: ') as raised, reading:
    raise error
  assert isinstance(raised.value, checkpoint_format.DamagedError) != is_transient


def test_a_reason_is_one_line_without_internals():
  text = ('\n  Failed to open "/a/b": No space left on device '
          "[os_error_code='28'] [tensorstore_spec='{}']\nand more")
  assert checkpoint_format.short_reason(
      ValueError(text)) == 'Failed to open "/a/b": No space left on device'
  assert checkpoint_format.short_reason(KeyError()) == 'KeyError'
  cut = checkpoint_format.short_reason(ValueError('a' * 500 + 'full'))
  assert len(cut) < 300
  assert cut.endswith('full')


def test_a_sentence_may_follow_the_error():
  saving = checkpoint_format.storage_errors(
      'save', advice=lambda: 'The checkpoint of step 2 is kept.')
  match = r'^Cannot save: disk full\. The checkpoint of step 2 is kept\.$'
  with pytest.raises(ValueError, match=match), saving:
    raise OSError('disk full.')
