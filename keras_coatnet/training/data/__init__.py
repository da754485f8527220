"""From files to batches: folders, tensorflow-datasets, decoding, augmentation, pipeline."""
