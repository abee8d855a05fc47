"""The page of a served detector: an image and a question to a verdict, a heat map and words.

One line of data: an upload -> ``uploads`` (checked, decoded) -> ``findings`` (through the server's batcher to
``predictor``, the model) -> ``rendering`` and ``drawing`` -> ``blocks``, the gradio page. ``served`` is what
``hpcmm.serve`` takes.
"""
