"""Triton kernels: one file an op, named as in ``u2a_fast.reference`` and with the same signature and meaning.

The files of this package that start with an underscore hold what several ops share: ``_launch`` the host side
(device family, configurations, launching), ``_tile`` the device side (tile products, softcap, reductions),
``_attention`` what only the attention kernels share.
Importing this package does not import Triton.
"""
