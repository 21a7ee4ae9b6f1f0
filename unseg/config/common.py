"""Keys that several methods share: the mapper, the evaluators, the optimizer, weight averaging."""

from detectron2.config import CfgNode


def add_common_config(cfg: CfgNode) -> None:
    """Add the shared keys to `cfg` in place."""
    # Name in the MAPPERS registry (unseg.data.build) of the mapper for training and testing.
    cfg.INPUT.MAPPER = "InstanceMapper"
    # Take all categories for one (0): for class-agnostic models on data sets with classes.
    cfg.INPUT.CLASS_AGNOSTIC = False
    # InstanceMapper drops crowd annotations; True: their masks are given as `crowd_masks`.
    cfg.INPUT.KEEP_CROWDS = False
    # What to do with an image that cannot be read: "raise" (the error names the file) or "skip".
    # Training then takes another one in its place, and raises all the same once it is clear that
    # more than 1 % of the data are bad. Mask discovery leaves it out, counts it and reports the
    # number, however large. Evaluation always raises: its results would be of another data set.
    cfg.INPUT.ON_BAD_IMAGE = "raise"

    # Names in the EVALUATORS registry (unseg.evaluation.build). Empty: chosen by each dataset's
    # `evaluator_type` metadata.
    cfg.TEST.EVALUATORS = ()
    cfg.TEST.CLASS_AGNOSTIC = CfgNode()
    # Caps on detections per image at which average recall is reported. AP is taken at 100.
    # TEST.DETECTIONS_PER_IMAGE and the model's own caps must not be below the largest of them.
    cfg.TEST.CLASS_AGNOSTIC.MAX_DETS = (1, 10, 100)
    cfg.TEST.PROPOSALS = CfgNode()
    # Caps on proposals per image at which ProposalRecallEvaluator reports average recall.
    cfg.TEST.PROPOSALS.CAPS = (10, 100, 1000)

    # SGD (with SOLVER.MOMENTUM, SOLVER.NESTEROV) or ADAMW (betas 0.9, 0.999).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Exponential moving average of the weights, used for evaluation and saved in checkpoints.
    # --eval-only uses it too where the checkpoint holds one (ema/model_final.pth is the average).
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.999
