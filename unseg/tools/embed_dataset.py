"""Embed everything that a model finds in images, and keep it as an embedding store.

    python -m unseg.tools.embed_dataset --config-file CONFIG (--images DIR | --dataset NAME)
        --output DIR [--ground-truth] [--resume] [--num-gpus N] [KEY VALUE ...]

The config is that of a trained model with HierarchicalEmbedding... heads, whose weights
MODEL.WEIGHTS names. --ground-truth embeds the annotated boxes and masks of the data set instead,
with their classes. The store is for unseg.tools.cluster_embeddings, and that of annotations for
MODEL.HIERARCHICAL_EMBEDDING.NAMING.GROUND_TRUTH.

A killed run goes on with --resume. Independent processes, e.g. of a cluster, can share the work:
give all of them the same --num-shards and each its --shard; whoever finds everything done writes
the store.
"""

from unseg.engine import embed_dataset, find_masks_parser, launch_job


def main() -> None:
    """Entry point."""
    parser = find_masks_parser(__doc__.split("\n\n")[0], output="the folder to write to")
    parser.add_argument(
        "--ground-truth", action="store_true", help="embed the annotations of the data set"
    )
    args = parser.parse_args()
    if args.ground_truth and not args.dataset:
        parser.error("--ground-truth needs a --dataset, which has annotations")
    launch_job(embed_dataset, parser)


if __name__ == "__main__":
    main()
