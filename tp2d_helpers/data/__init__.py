"""Text → tokens → samples → the batches of one DP rank, in an order that the seed alone decides; evaluation."""

from tp2d_helpers import lazy

__getattr__ = lazy(
    __name__,
    {
        "prepare_tokens": "tokens",
        "load_tokenizer": "tokenizer",
        "example_segments": "tokens",
        "load_text": "text",
        "TokenDataset": "dataset",
        "GlobalBatchSampler": "dataloader",
        "create_dataloader": "dataloader",
        "global_batches": "dataloader",
        "data_settings": "dataloader",
        "evaluate": "evaluation",
    },
)
