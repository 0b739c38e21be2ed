"""The Convolution-Augmented Transformer as a library: layers, tasks, training, evaluation (arXiv 2407.05591).

Knows no files, no YAML and no tracking; `pipeline` makes a study of it.
"""
