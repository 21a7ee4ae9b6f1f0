"""The exemplar pool of a training: read, kept up to date across kills, its use in the log."""

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from unseg.discovery import ExemplarError, load_exemplar_pool
from unseg.modeling import find_exemplar_head, with_exemplars
from unseg.modeling.exemplars import ExemplarContrast
from unseg.modeling.losses import largest_exemplar_loss

logger = logging.getLogger(__name__)

_LOG_PERIOD = 20  # steps, as Detectron2's own
# A weighted loss below this does nothing beside FreeSOLO's, which are around 1.
_IDLE_LOSS = 0.05


def embedding_origin(cfg: CfgNode) -> dict[str, str]:
    """What a config's embeddings are of: ``feature`` and ``backbone``, without its weights."""
    name = cfg.MODEL.BACKBONE.NAME
    if "resnet" in name:
        name = f"{name}, depth {cfg.MODEL.RESNETS.DEPTH}"
    return {"feature": cfg.MODEL.EXEMPLAR.IN_FEATURE, "backbone": name}


def attach_exemplars(model: nn.Module, cfg: CfgNode) -> ExemplarContrast | None:
    """Give a model's exemplar head the pool of ``MODEL.EXEMPLAR.POOL``.

    Returns:
        the head, or None for models that have none (or one of weight 0).

    Raises:
        ExemplarError: there is no pool, its file cannot be read, or its embeddings are to be used
            (UPDATE_PERIOD 0) and are of another backbone.
    """
    head = find_exemplar_head(model)
    if head is None:
        return None
    exemplar = cfg.MODEL.EXEMPLAR
    if not exemplar.POOL:
        raise ExemplarError(
            "MODEL.EXEMPLAR.POOL is empty: training needs an exemplar pool, a file of "
            "python -m unseg.tools.build_exemplars"
        )
    pool = load_exemplar_pool(exemplar.POOL, exemplar.PER_CATEGORY)
    origin, wanted = pool.info.get("embedding"), embedding_origin(cfg)
    if not exemplar.UPDATE_PERIOD and origin and wanted.items() - origin.items():
        raise ExemplarError(
            f"MODEL.EXEMPLAR.POOL {exemplar.POOL} has embeddings of {origin.get('feature')} "
            f"({origin.get('backbone')}), the model has {wanted['feature']} "
            f"({wanted['backbone']}): with MODEL.EXEMPLAR.UPDATE_PERIOD above 0 the pool is "
            "encoded anew"
        )
    logger.info(
        "%d exemplars of %d categories", len(pool), len({x.category for x in pool.exemplars})
    )
    bound = head.weight * largest_exemplar_loss(head.alpha, head.beta, head.temperature)
    if bound < _IDLE_LOSS:
        logger.warning(
            "no object's loss_exemplar can be above %.2g, which will hardly change the model: "
            "bring MODEL.EXEMPLAR.ALPHA %g, BETA %g closer to each other or raise TEMPERATURE %g "
            "(unseg.tools.exemplar_similarity helps)",
            bound,
            head.alpha,
            head.beta,
            head.temperature,
        )
    with_exemplars(
        model,
        pool,
        update_period=exemplar.UPDATE_PERIOD,
        batch_size=exemplar.BUILD.BATCH_SIZE,
    )
    return head


class ExemplarHook(HookBase):
    """Keeps the pool's embeddings in checkpoints; logs how many objects find exemplars, and warns
    when none does.

    Means over the last steps of this rank, per step: ``exemplar/objects``, ``.../positives``
    (objects with a positive exemplar), ``.../used`` (those with negatives as well, which the loss
    is about), and ``.../negatives``, per object.
    """

    def __init__(self, head: ExemplarContrast):
        """
        Args:
            head: has a pool.
        """
        self.head = head
        self._steps = 0  # that the head has counted in; fewer than _LOG_PERIOD after a kill
        self._was_used = True

    def after_step(self) -> None:
        self._steps += 1
        if (self.trainer.iter + 1) % _LOG_PERIOD:
            return
        objects, positives, used, negatives = self.head.tally.tolist()
        self.head.tally.zero_()
        steps, self._steps = self._steps, 0
        self.trainer.storage.put_scalars(
            smoothing_hint=False,
            **{
                "exemplar/objects": objects / steps,
                "exemplar/positives": positives / steps,
                "exemplar/used": used / steps,
                "exemplar/negatives": negatives / max(objects, 1),
            },
        )
        if self._was_used and objects and not used:
            logger.warning(
                "none of %d objects in %d steps had both a positive and a negative exemplar, so "
                "loss_exemplar was 0: unseg.tools.exemplar_similarity helps to choose "
                "MODEL.EXEMPLAR.ALPHA and BETA",
                objects,
                steps,
            )
        self._was_used = bool(used)

    def state_dict(self) -> dict[str, Any]:
        return self.head.encoder.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.encoder.load_state_dict(state)
