"""Meta-architectures."""

from unseg.modeling.meta_arch.deep_spectral import DeepSpectral
from unseg.modeling.meta_arch.deepmask import DeepMask
from unseg.modeling.meta_arch.exemplar_freesolo import ExemplarFreeSOLO
from unseg.modeling.meta_arch.freesolo import FreeSOLO
from unseg.modeling.meta_arch.instance_fcn import InstanceFCN
from unseg.modeling.meta_arch.long_tail import LongTailDiscoveryRCNN
from unseg.modeling.meta_arch.mask_discovery import MaskDiscovery
from unseg.modeling.meta_arch.sharpmask import SharpMask

__all__ = [
    "DeepMask",
    "DeepSpectral",
    "ExemplarFreeSOLO",
    "FreeSOLO",
    "InstanceFCN",
    "LongTailDiscoveryRCNN",
    "MaskDiscovery",
    "SharpMask",
]
