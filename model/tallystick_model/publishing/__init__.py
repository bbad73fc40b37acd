"""From a checkpoint on disk to pieces and a manifest in a store."""
