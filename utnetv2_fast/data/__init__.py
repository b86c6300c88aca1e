"""From NIfTI folders to training batches: read, verify, plan, prepare, split, sample, augment."""
