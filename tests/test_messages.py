"""Texts of messages: one line, short, and harmless to a terminal."""

import pytest

from dfkd_jax import messages


@pytest.mark.parametrize(('value', 'text'), [
    ('conv1.weight', 'conv1.weight'), ('a\x1b[2J\u202e', r'a\x1b[2J\u202e'), ('a' * 80, 'a' * 80),
    ('a' * 90, f'{"a" * 40} ... {"a" * 40}'), (7, '7'), (None, 'None'), ((1, 2), 'a tuple'),
    (b'\0', r"b'\x00'"), ({}, 'a dict')], ids=range(9))
def test_names_from_a_file(value, text):
  assert messages.safe_name(value) == text


def test_names_from_a_file_are_sorted_and_few():
  assert messages.safe_names(['c', 'a', 'b'], 2) == ['a', 'b']


def test_a_line_is_short():
  assert messages.one_line('a\n  b\x1b') == r'a b\x1b'
  assert messages.one_line('a' * 1000) == 'a' * 1000
  assert messages.one_line(ValueError('a' * 10**6)) == f'{"a" * 500} ... {"a" * 500}'
  assert len(messages.one_line('\x1b' * 10**6)) < 1010
  assert messages.short_repr('x' * 1000) == f"'{'x' * 49} ... {'x' * 49}'"


@pytest.mark.parametrize(('error', 'message'), [
    (messages.RefusedError('is a pipe'), 'Refused to read w: it is a pipe.'),
    (KeyError('a\nb'), r"Could not read w: it is truncated or damaged ('a\nb')."),
    (EOFError(), 'Could not read w: it is truncated or damaged (EOFError).')])
def test_errors_of_a_file_are_one_line(error, message):
  with pytest.raises(ValueError, match='read w') as caught, messages.explain_read_errors('w'):
    raise error
  assert str(caught.value) == message


def test_a_name_that_is_not_allowed_is_told_with_the_nearest():
  assert messages.check_choice('cosine', ('cosine', 'constant'), 'schedule') == 'cosine'
  with pytest.raises(ValueError, match=r"schedule 'cosin'.*mean 'cosine'.*cosine, constant"):
    messages.check_choice('cosin', ('cosine', 'constant'), 'schedule')
  assert messages.nearest('xyz', ('cosine',)) == ''


def test_an_error_carries_its_field():
  error = messages.FieldError('optimizer.schedule', 'must be cosine')
  assert (error.field, str(error)) == ('optimizer.schedule', 'must be cosine')
