"""Sweeps of segmentation models: planned here, trained by Ray, tracked in MLflow."""
