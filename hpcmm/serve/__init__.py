"""``python -m hpcmm.serve``: a trained run behind a page, for those who have its token. See ``--help``.

One line of data: an upload -> ``uploads`` (checked, decoded) -> ``batcher`` (requests of several users together) ->
``predictor`` (the model) -> ``answers`` and ``drawing`` -> ``page``. ``guard`` stands in front of all of it.
"""
