"""System tests: real QEMU guests whose TPM real emulators serve."""
