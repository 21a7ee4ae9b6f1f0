"""Data sets registered with Detectron2; importing this package registers them.

The root folder is read from ``DETECTRON2_DATASETS`` at the import, as in Detectron2. No file is
read, and no scene drawn, before its data set is asked for.
"""

from unseg.data.datasets.builtin import register_builtin_datasets
from unseg.data.datasets.synthetic import register_synthetic_datasets

register_builtin_datasets()
register_synthetic_datasets()

__all__ = ["register_builtin_datasets", "register_synthetic_datasets"]
