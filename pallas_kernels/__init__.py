"""Kernels: arrays in, arrays out; they know no model and no mesh.

Letters at the end of an array's name are its dimensions:
  M rows (tokens)        K contraction        N columns        G groups (experts)
Attention kernels use the model's letters:
  B batch   T query position   S key position   N heads   A query/key head   U value head
A lower-case letter counts that dimension in blocks of 128: `scale_Mk`.
Weights are stored output first, contraction last: `w_NK`, `w_GNK`.

Each op folder reads api.py (contract, checks, choice, gradient), reference.py (the meaning in plain
jnp), hopper.py (the Mosaic GPU kernel, with the tiles measured in tuned.py) or cudnn.py.
"""
