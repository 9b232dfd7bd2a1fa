"""Data: sources and their index, the sample plan, decoders, augmentation, and the loader of batches."""
