"""transformers: models are loaded, saved and dequantized with packed layers of this package.

`dispatch` puts the quantizer into transformers' table, `quantizer` and `operations` do the work while a checkpoint is
loaded, and `attach` tells a model that was made in another way the same as a load would have. transformers is imported
by the last three only, which nothing imports before transformers itself is there.
"""
