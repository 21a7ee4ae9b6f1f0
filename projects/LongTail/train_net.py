#!/usr/bin/env python
"""Train and evaluate, with Detectron2's flags:

python projects/LongTail/train_net.py --config-file CONFIG [--num-gpus N] [--resume]
    [--eval-only] [KEY VALUE ...]
"""

from unseg.engine import main

if __name__ == "__main__":
    main()
