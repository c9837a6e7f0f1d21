"""The reference loop: pretrain, RLVR and SFT of a small decoder on tasks that a program can check.

Read in this order: ``tasks``, ``model``, ``rollout``, ``objectives``, ``gates``, ``stages``.
Source: arXiv 2511.08567, sections 3.1 and 5, appendix C.
"""
