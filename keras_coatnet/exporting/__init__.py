"""Out of Python: models written in other formats, verified, and run there.

`export.py` is where a model leaves and `loaded.py` where it is opened again. Between them stand
`preparation.py`, from any model to the one that is written, and a file for each format, whose
contract is `runtime.py`.
"""
