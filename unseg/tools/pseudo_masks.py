"""Find masks in a folder of images or a data set and write them as a pseudo-mask file.

    python -m unseg.tools.pseudo_masks --config-file CONFIG (--images DIR | --dataset NAME)
        --output x.json [--resume] [--num-gpus N] [KEY VALUE ...]

The config names the model: a discoverer (META_ARCHITECTURE MaskDiscovery) or any trained model
whose output has masks. The file can be trained on as ``DATASETS.TRAIN "('x.json@DIR',)"``. A killed
run goes on with --resume. Independent processes, e.g. of a cluster, can share the work: give all of
them the same --num-shards and each its --shard; whoever finds everything done writes the file.
"""

from unseg.engine import find_masks, find_masks_parser, launch_job


def main() -> None:
    """Entry point."""
    launch_job(find_masks, find_masks_parser(__doc__.split("\n\n")[0]))


if __name__ == "__main__":
    main()
