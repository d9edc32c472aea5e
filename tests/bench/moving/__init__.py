"""Move vTPMs: between two emulators at their sockets, with QEMU's guests, and armed without end."""
