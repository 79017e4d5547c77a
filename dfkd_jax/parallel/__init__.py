"""Devices, processes and collectives."""
# ruff: noqa: I001 (imports are wrapped by hand)

from dfkd_jax.parallel.devices import (
    AXIS, BATCHES, REPLICATED, SPREAD, by_task, each_device, even_share, gather, local_copy,
    make_mesh, memory_limit, place, pmax, pmean, psum, sharded, specs, task_keys)
from dfkd_jax.parallel.processes import (
    check_same_on_all, check_shared_folder, gather_processes, gather_rows, is_first, process_rows,
    process_shard, raise_on_all_processes)
