"""Kernels, one folder per op. Each folder: the op (``__init__``), what backends agree on (``contract``),
the definition of correct (``reference``), and the fast twins (``native``, ``triton_kernel``)."""
