"""Test helpers that speak to a TPM and to its emulator."""
