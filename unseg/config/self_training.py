"""cfg.SELF_TRAINING: rounds of training on masks that the model of the round before has found."""

from detectron2.config import CfgNode


def add_self_training_config(cfg: CfgNode) -> None:
    """Add the keys of unseg.tools.self_train to `cfg` in place. Defaults are FreeSOLO's."""
    cfg.SELF_TRAINING = CfgNode()
    # Trainings in all: the first on the given masks, each other one on its predecessor's.
    cfg.SELF_TRAINING.ROUNDS = 2
    # Start each round from the weights of the one before instead of from MODEL.WEIGHTS. With
    # SOLVER.EMA these are the averaged ones, as for finding masks.
    cfg.SELF_TRAINING.FROM_PREVIOUS = False
    # Which of a trained model's masks the next round learns from.
    cfg.SELF_TRAINING.SCORE_THRESHOLD = 0.3
    cfg.SELF_TRAINING.MAX_MASKS_PER_IMAGE = 20
    # Masks whose box is at least this wide, as a fraction of the image, are left out.
    cfg.SELF_TRAINING.MAX_WIDTH = 0.95
