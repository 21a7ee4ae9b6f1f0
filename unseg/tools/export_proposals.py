"""Write a model's proposals on a data set: boxes for Detectron2, masks as COCO results.

    python -m unseg.tools.export_proposals --config-file CONFIG --dataset NAME --output DIR
        [--resume] [--num-gpus N] [KEY VALUE ...]

Any model whose output has `proposals` or `instances` will do. DIR/box_proposals.pkl is for
DATASETS.PROPOSAL_FILES_TRAIN of a model with MODEL.LOAD_PROPOSALS True and
MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals; DIR/mask_proposals-00000.json, ... hold the
masks of 500 images each. A killed run goes on with --resume. Independent processes, e.g. of a
cluster, can share the work: give all of them the same --num-shards and each its --shard; whoever
finds everything done writes the files.
"""

from unseg.engine import export_proposals, find_masks_parser, launch_job


def main() -> None:
    """Entry point."""
    description = __doc__.split("\n\n")[0]
    parser = find_masks_parser(description, output="the folder to write to", folders=False)
    launch_job(export_proposals, parser)


if __name__ == "__main__":
    main()
