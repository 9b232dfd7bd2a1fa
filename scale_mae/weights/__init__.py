"""Weights: import from other sources, export to other formats, verification and inspection.

Import: ``weight_files`` opens a source, ``weight_import`` renames its tensors, ``key_matching`` checks them against a model,
and ``initialization`` loads them into it. Export: ``convert`` runs the steps, ``export_source`` provides the tensors,
``export_formats`` writes them, ``parity`` verifies them, and ``atomic_write`` moves them into place.
"""
