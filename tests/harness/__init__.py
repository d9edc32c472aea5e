"""Run emulators and QEMU guests that use them: for system tests, the demo and the benches."""
