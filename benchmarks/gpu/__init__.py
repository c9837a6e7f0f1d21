"""GPU evidence: ``python -m benchmarks.gpu`` on a CUDA machine, in slices that can be interrupted and taken up again.

A slice is one subject in a process of its own, with a time limit of at most eight minutes: a part of the test-suite,
the sanitizer, the ceilings, or an op with its peers. Nothing is timed before its result has been compared with the CPU.

Results: one file per device, ``benchmarks/results/gpu-<device>.json``, rewritten as a whole after every slice. ::

    {"format": 1, "device": "NVIDIA H100 80GB HBM3", "runs": [RUN, ...]}

``RUN``: what one day's slices found with one set of versions; never added to with others, never mixed.

    date, driver, versions   what a run is known by: UTC date, driver, versions of Python, torch, CUDA, Triton, ...
    properties               of the device: capability, memory_bytes, l2_bytes, multiprocessors
    sample                   true in files that tests make; the figure then says so
    slices                   by name: {"status", "seconds", "at", "sources", and what the slice found}

``status`` is ``ok``, ``failed`` (``error`` says why, ``log`` has the last lines of output, ``rows`` what was measured
before), ``partial`` (stopped from outside or by --within; ``rows`` are written as they are made, and the next run
starts it again) or ``skipped`` (``error`` says what is missing). ``sources`` is a digest of the sources of package,
kernels and benchmarks as they were. What a slice finds:

    facts      anything worth knowing of the machine or of the sanitizer's verdict
    ceilings   what the device reaches, by name: {"unit", "value", "ms"}
    tests      {"passed", "failed", "skipped", "xfailed", "failures": [{"test", "says"}], "unfinished": test or null}
    rows       of measurements:

    op, case, backend   what was called
    sizes               shapes, dtype, k, ...
    ms                  {"median", "min", "q1", "q3", "max", "rounds"}, by device events: the
                        device alone, but for calls that wait for it
    host_ms             median that a call takes to return, while the device is still busy with what came before; null
                        for calls that wait for the device
    bytes               that must cross device memory, each input read and each output written once, or null
    operations          arithmetic that must be done (a comparison or a popcount of a word counts as one), or null
    ceiling             {"name", "unit", "value"}: measured in turns with the op, or null
    floor_ms            at that ceiling
    share               floor_ms / median, of the ceiling
    ratios              [{"what", "value", "bar", "at_most", "met", "ms"}]: against a bar or a peer. ``met`` is null
                        without a bar; with ``at_most`` the bar is an upper one; ``ms`` is the peer's spread
    details             whatever else a reader wants
"""
