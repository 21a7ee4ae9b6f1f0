"""R-CNNs of Detectron2's model zoo, narrow enough for seconds, with and without embeddings."""

import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

from unseg.config import load_config

FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
DC5 = "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
HEADS = {
    FPN: "HierarchicalEmbeddingROIHeads",
    C4: "HierarchicalEmbeddingRes5ROIHeads",
    DC5: "HierarchicalEmbeddingROIHeads",
    CASCADE: "HierarchicalEmbeddingCascadeROIHeads",
}
NARROW = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 5,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 40,
    "TEST.DETECTIONS_PER_IMAGE": 8,
}
# Of the embedding head.
SMALL = {"NUM_CONV": 1, "CONV_DIM": 16, "FC_DIM": 16, "EMBED_DIM": 6, "INIT_STD": 0.3}


def zoo_config(yaml=FPN, embed=True, embedding=None, **changes):
    """The config of a YAML; `changes` of keys with "__" for ".", `embedding` of the head's node."""
    options = NARROW | {key.replace("__", "."): value for key, value in changes.items()}
    if embed:
        options.setdefault("MODEL.ROI_HEADS.NAME", HEADS[yaml])
        node = SMALL | (embedding or {})
        options |= {f"MODEL.HIERARCHICAL_EMBEDDING.{key}": v for key, v in node.items()}
    opts = [x for item in options.items() for x in item]
    return load_config(model_zoo.get_config_file(yaml), opts)


def noise_inputs(*sizes, seed=0):
    """Images of these (H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)}
        for size in sizes or [(96, 128), (128, 96)]
    ]


def labelled(inputs):
    """The inputs with two objects each."""
    for x in inputs:
        height, width = x["image"].shape[1:]
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 8:60, 10:70] = True
        masks[1, 30:90, 40:90] = True
        objects = Instances((height, width), gt_masks=BitMasks(masks))
        objects.gt_boxes = Boxes(torch.tensor([[10.0, 8, 70, 60], [40, 30, 90, 90]]))
        objects.gt_classes = torch.tensor([1, 3])
        x["instances"] = objects
    return inputs


@torch.no_grad()
def build_tame(cfg, seed=0):
    """A model with random weights whose numbers are of the size of a trained one's, so that it
    finds something. Without norms, features are proportional to the stem's weights."""
    torch.manual_seed(seed)
    model = build_model(cfg).eval()
    images = model.preprocess_image(noise_inputs())
    features = model.backbone(images.tensor)
    bottom = getattr(model.backbone, "bottom_up", model.backbone)
    bottom.stem.conv1.weight /= torch.cat([x.flatten() for x in features.values()]).std()
    return model


def without_embeddings(cfg):
    """The same config with Detectron2's own heads."""
    plain = cfg.clone()
    plain.defrost()
    name = plain.MODEL.ROI_HEADS.NAME.removeprefix("HierarchicalEmbedding")
    plain.MODEL.ROI_HEADS.NAME = {"ROIHeads": "StandardROIHeads"}.get(name, name)
    plain.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    return plain


def pair_of_models(cfg, seed=0):
    """Detectron2's model, and ours with its weights."""
    plain = build_tame(without_embeddings(cfg), seed)
    torch.manual_seed(seed + 1)
    ours = build_model(cfg)
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(key.startswith("roi_heads.embedding_head.") for key in missing)
    return plain, ours.eval()


def assert_same(first, second, fields=None):
    """Instances that are equal in these fields, bit for bit; all of the first's if None."""
    assert first.image_size == second.image_size
    for name in fields or first.get_fields():
        one, other = (getattr(x.get(name), "tensor", x.get(name)) for x in (first, second))
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name
