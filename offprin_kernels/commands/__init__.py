"""The commands of ``offprin``, one module each: ``add`` declares its options, ``run`` calls and prints."""
