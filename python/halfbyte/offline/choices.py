"""The legal values of options, without an import: the command line shows them before it does anything else."""

QUANT_TYPES = ("nf4", "fp4")
WEIGHT_TYPES = (*QUANT_TYPES, "int8")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORAGE_DTYPES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
FLOAT_DTYPES = ("bfloat16", "float16", "float32")
SELECTIONS = ("rules", "transformers")
