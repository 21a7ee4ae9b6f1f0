"""FreeSOLO in the trainer: both views from files, the warm-up of a new and a resumed run, NaN."""

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from freesolo_cases import narrow_config, patches, rectangles
from PIL import Image

from unseg.data.mappers import MAPPERS, TwoViewInstanceMapper
from unseg.engine import Trainer
from unseg.modeling.meta_arch import freesolo as module
from unseg.structures import encode_masks

SPOILED = "2.png"


@MAPPERS.register()
class NaNInOneStrongView(TwoViewInstanceMapper):
    def __call__(self, dataset_dict):
        result = super().__call__(dataset_dict)
        result["strong_image"] = result["strong_image"].float()
        if result["file_name"].endswith(SPOILED):
            result["strong_image"][0, 5, 5] = float("nan")
        return result


@pytest.fixture
def scenes(tmp_path, register):
    """Four images of 64 x 80 pixels with three objects; those of the last have no embedding."""
    rng = np.random.default_rng(0)
    dicts = []
    for i in range(4):
        path = tmp_path / f"{i}.png"
        Image.fromarray(patches(rng, 64, 80).transpose(1, 2, 0)).save(path)
        annotations = [
            {
                "bbox": [0, 0, 1, 1],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "iscrowd": 0,
                "segmentation": encoded,
            }
            | ({"embedding": rng.normal(size=10).tolist()} if i < 3 else {})
            for encoded in encode_masks(rectangles(rng, 3, 64, 80))
        ]
        size = {"height": 64, "width": 80}
        dicts.append({"file_name": str(path), "image_id": i, "annotations": annotations, **size})
    return register(dicts, "freesolo_scenes", thing_classes=["object"])


def make_trainer(scenes, output, resume=False, **changes):
    options = {
        "DATASETS__TRAIN": (scenes,),
        "DATASETS__TEST": (),
        "INPUT__MIN_SIZE_TRAIN": (64,),
        "SOLVER__IMS_PER_BATCH": 2,
        "SOLVER__MAX_ITER": 2,
        "SOLVER__WARMUP_ITERS": 1,
        "MODEL__FREESOLO__LOSS__PAIRWISE_WARMUP_ITERS": 10,
        "OUTPUT_DIR": str(output),
        "SEED": 3,
    }
    cfg = narrow_config(**options | changes)
    torch.manual_seed(cfg.SEED)
    output.mkdir(exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    return trainer


FULL = {
    "MODEL__FREESOLO__DATA__COPY_PASTE": True,
    "MODEL__FREESOLO__DATA__APPEND_WEAK_VIEW": True,
    "MODEL__FREESOLO__DATA__BLUR_PROB": 1.0,
    "MODEL__FREESOLO__DATA__ERASING": ((1.0, 0.1, 0.2, 0.5, 2.0),),
}


def test_two_views_with_pasted_objects(scenes, tmp_path, monkeypatch):
    seen, pasted = [], []
    original = module.copy_paste

    def remember(*args, **options):
        pasted.append((args, original(*args, **options)))
        return pasted[-1][1]

    monkeypatch.setattr(module, "copy_paste", remember)
    trainer = make_trainer(scenes, tmp_path / "out", **FULL)
    trainer.model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trainer.train()
    assert [x.shape for x in seen] == [(4, 3, 64, 96)] * 2
    model = trainer.model
    for x, ((strong, targets, weak, sources), (images, objects)) in zip(
        seen, [(args, result) for args, result in pasted], strict=True
    ):
        pixels = (x * model.pixel_std + model.pixel_mean)[..., :80]
        for n in range(2):
            torch.testing.assert_close(pixels[n], images[n], atol=1e-3, rtol=0)
            torch.testing.assert_close(pixels[2 + n], weak[1 - n], atol=1e-3, rtol=0)
            assert (strong[n] - weak[1 - n]).abs().mean() > 3, "the strong view is another one"
            assert len(targets[n]) == len(sources[1 - n]) == 3
            assert objects[n].gt_embeddings.shape[1] == 6
    assert any(len(o) > 3 for _, (_, objects) in pasted for o in objects)
    losses = trainer._watch.losses
    assert losses["loss_semantic"] > 0
    assert all(v.isfinite() for v in losses.values())


def test_warm_up_begins_with_the_run_and_goes_on_in_a_resumed_one(scenes, tmp_path):
    first = make_trainer(scenes, tmp_path / "out")
    first.train()
    assert first.model._iter.tolist() == [2]
    file = tmp_path / "out/model_final.pth"
    assert torch.load(file)["model"]["_iter"].tolist() == [2]

    new = make_trainer(scenes, tmp_path / "new", MODEL__WEIGHTS=str(file))
    assert new.model._iter.tolist() == [0]
    weights, other = first.model.state_dict(), new.model.state_dict()
    assert all(torch.equal(weights[k], other[k]) for k in weights if k != "_iter")

    resumed = make_trainer(scenes, tmp_path / "out", resume=True, SOLVER__MAX_ITER=3)
    assert resumed.model._iter.tolist() == [2]
    resumed.train()
    assert resumed.model._iter.tolist() == [3]

    # Nothing to resume from: a new run.
    empty = make_trainer(scenes, tmp_path / "e", resume=True, MODEL__WEIGHTS=str(file))
    assert empty.model._iter.tolist() == [0]


def test_nan_in_a_view_stops_the_training_and_names_the_image(scenes, tmp_path):
    trainer = make_trainer(
        scenes,
        tmp_path / "out",
        INPUT__MAPPER="NaNInOneStrongView",
        SOLVER__IMS_PER_BATCH=4,
    )
    with pytest.raises(FloatingPointError, match=rf"loss_category(?s:.*)2 \(.*{SPOILED}\)"):
        trainer.train()
