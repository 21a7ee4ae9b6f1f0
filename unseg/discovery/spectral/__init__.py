"""Segmentation by the eigenvectors of patch graphs."""
