"""Find, segment and group objects without labels: a Detectron2 extension.

Importing the package registers its models, backbones, datasets and evaluators with Detectron2.
"""

from unseg.compat import require_detectron2

__version__ = "0.1.0"

require_detectron2()




__all__ = ["__version__", ]
