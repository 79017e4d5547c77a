"""Whether networks, generators and augmentations take or make the images of a config; none is computed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dfkd_jax.config import build
from dfkd_jax.config.check_fields import Problems

_SHAPES = ((32, 32), (224, 224))  # Of images that a network is tried with, where it takes none of the config's.
ON_IMAGES = ('dataset.image_shape', 'dataset.num_classes', 'compute_dtype')


def network(config: build.Config, problems: Problems, which: str, needed: bool = True) -> None:
  """The name of a network, and whether it takes the images."""
  if not needed and config[which].name is None:
    return
  problems.ask(lambda: build.model(config, which), f'{which}.name', on=['dataset.num_classes'])
  takes_images(config, problems, lambda of: build.module(of, which), f'{which}.options', f'{which}.name',
               f'{which}.resize')


def takes_images(
    config: build.Config, problems: Problems, make: Callable[[build.Config], object], field: str, *on: str) -> None:
  """Whether something is made for the images of a config; where it is for others, their shape is what is wrong."""
  if problems.concern(field, *on, *ON_IMAGES):
    return
  try:
    make(config)
  except ValueError as error:
    problems.add(str(error), 'dataset.image_shape' if _for_others(config, make) else field)


def _for_others(config: build.Config, make: Callable[[build.Config], object]) -> bool:
  for height, width in _SHAPES:
    other = build.Config(config.to_dict())
    other.dataset.image_shape = (height, width, config.dataset.image_shape[-1])
    try:
      make(other)
      return True
    except ValueError:
      continue
  return False


def generator(config: build.Config) -> None:
  """Raises ValueError unless the generator makes the images of the data set."""
  made, shape = build.generator(config), tuple(config.dataset.image_shape)
  latents = build.latent_dim(config) if 'latent_dim' in config.method else 2
  latents = jax.ShapeDtypeStruct((2, *((latents,) if isinstance(latents, int) else latents)), jnp.float32)
  try:
    images = jax.eval_shape(lambda key, drawn: made.init_with_output(key, drawn)[0], jax.random.key(0), latents)
  except Exception as error:  # Whatever a width of 0, or one of another type, leads to.
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(f'generator.options is {build.plain(config.generator.options)}, with which generator '
                     f'{config.generator.name!r} makes no images {shape}: {reason}') from error
  if images.shape[1:] != shape:
    raise ValueError(f'dataset.image_shape is {shape}, but the generator makes images {images.shape[1:]}.')


def augmentation(config: build.Config, problems: Problems, which: str) -> None:
  """Its name and options, and that it runs on the images."""
  section, field = config.augment[which], f'augment.{which}'
  if problems.concern(field):
    return
  make = problems.ask(lambda: build.augmentation(section), field)
  if make is None or problems.concern('dataset.image_shape'):
    return
  images = jax.ShapeDtypeStruct((2, *config.dataset.image_shape), jnp.float32)
  try:
    jax.eval_shape(make, jax.random.key(0), images)
  except Exception as error:  # Whatever an option of another type leads to.
    reason = ' '.join(str(error).split())[:200]
    problems.add(f'{field} is {build.plain(section)}, which cannot be applied to images '
                 f'{tuple(config.dataset.image_shape)}: {reason}', field)
