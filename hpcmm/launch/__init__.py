"""From Hydra overrides to a queued job, on a login node: no torch, deepspeed or transformers is imported here.

>>> from hpcmm.launch.plan import launch
>>> submission = launch(["experiment=anomaly_demo"])
>>> submission.run.root, submission.job_id
"""
