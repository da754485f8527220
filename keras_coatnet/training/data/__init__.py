"""Opens data sets, and decodes, augments and batches their images."""
