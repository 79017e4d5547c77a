"""Reports of a run: time by part, metrics, summary, pictures, progress.

Knows no method and no config. Errors are ValueErrors of one line.
"""

from dfkd_jax.report.files import replace_file, reporting_disk_errors
from dfkd_jax.report.image_grid import color_masks, image_grid, mask_grid
from dfkd_jax.report.ledger import COUNTS, PARTS, Ledger, device, versions
from dfkd_jax.report.metrics import METRICS, MetricsWriter
from dfkd_jax.report.progress import Progress, note, say
from dfkd_jax.report.summary import PRIVACY, Summary, check_summary, format_summary, write_summary

__all__ = ['COUNTS', 'METRICS', 'PARTS', 'PRIVACY', 'Ledger', 'MetricsWriter', 'Progress',
           'Summary', 'check_summary', 'color_masks', 'device', 'format_summary', 'image_grid',
           'mask_grid', 'note', 'replace_file', 'reporting_disk_errors', 'say', 'versions',
           'write_summary']
