"""Weights: import from other sources, export to other formats, verification and inspection.

Import
    ``weight_files``: opens files and folders. ``safe_unpickle``: loads pickles without running code.
    ``weight_import``: renames the tensors of any source to scale_mae's keys. ``huggingface``: keys and configs of transformers.
    ``provenance``: what is known of weights apart from their tensors. ``key_matching``: strict matching against a model.
    ``pos_embed_matching``: position embeddings for another grid. ``encoder_import``: any encoder as a timm model.
    ``initialization``, ``classifier_initialization``: the initial model of a run. ``model_loader``: trained models in Python.

Export
    ``convert``: the steps of an export. ``export_source``: what is exported. ``export_formats``: the formats.
    ``graph_export``: ONNX and torch.export. ``classifier_heads``: the heads of classifier checkpoints.
    ``metadata``: what every export stores in addition to the tensors. ``parity``: the check that an export computes the same.
    ``atomic_write``: a complete file or none.

Both
    ``model_builder``: models from a config or from metadata. ``inspection``, ``file_inspection``: ``scale-mae inspect``.
    ``command``: the commands ``convert``, ``init`` and ``inspect``.
"""
