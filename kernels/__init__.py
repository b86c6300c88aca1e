"""Triton kernels, one file per operator; installed as utnetv2_fast.kernels."""
