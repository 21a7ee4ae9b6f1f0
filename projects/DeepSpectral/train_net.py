#!/usr/bin/env python
"""Evaluate spectral segmentation, or train a model on its masks, with Detectron2's flags:

python projects/DeepSpectral/train_net.py --config-file CONFIG [--num-gpus N] [--resume]
    [--eval-only] [KEY VALUE ...]
"""

from unseg.engine import main

if __name__ == "__main__":
    main()
