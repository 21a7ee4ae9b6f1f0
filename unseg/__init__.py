"""Find, segment and group objects without labels: a Detectron2 extension.

Importing the package registers its models, backbones, datasets and evaluators with Detectron2.
"""

from unseg.compat import require_detectron2

__version__ = "0.1.0"

require_detectron2()

from unseg import data, evaluation, modeling  # noqa: E402, F401 (imported to register)
from unseg.config import add_unseg_config, get_cfg, load_config  # noqa: E402

__all__ = ["__version__", "add_unseg_config", "get_cfg", "load_config"]
