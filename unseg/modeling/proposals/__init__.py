"""Mask proposals: what DeepMask, SharpMask and InstanceFCN are made of."""
