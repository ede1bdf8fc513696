"""From the dataset options to batches: configuration, scan, buckets, captions, caches, loading.

The modules in the order of a run: ``dataset_options`` and ``dataset_config`` say what to train on,
``sources`` finds it, ``batches`` plans each epoch, ``cache`` and ``loader`` turn the plan into
tensors. ``buckets``, ``captions`` and ``images`` are the pieces they share; ``metadata`` describes
the data for the saved file. Only ``cache`` and ``loader`` import torch.
"""
