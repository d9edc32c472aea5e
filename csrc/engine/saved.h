/* A TPM 1.2's saved state: what TPM_SaveState keeps for a TPM_Startup(ST_STATE), as a guest sleeps.
 *
 * libtpms writes it as a file of its own, and removes it at the next command, which makes it of no
 * use: to start from it a second time would bring back PCRs that were extended since. So one that
 * comes with a volatile state is taken only if that says that it is of use: that it was saved and
 * nothing ran since, or that the TPM was powered on and not started up.
 *
 * As a blob it is QEMU's third, and there is one only if it is of use. In a session it is behind
 * the volatile state, in one image with it:
 *
 *     volatile state · saved state, or nothing · u32 bytes of that, big-endian
 *
 * What of the volatile state is read (TPM_VolatileAll_Store() in libtpms' tpm_startup.c):
 *
 *     u16 tag 1
 *     32 bytes                             constants that it was compiled with
 *     u16
 *     u16 tag 0x20, 5 × u8                 TPM_STCLEAR_FLAGS
 *     u16 tag 0x21                         TPM_STANY_FLAGS:
 *     u8, 2 × u32, 2 × u8                  whether it waits for TPM_Startup; …; whether it was
 * saved
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Return whether a saved state that has come with a volatile one is of use; false if it cannot be
 * told. */
bool saved_is_of_use(const uint8_t *volatile_state, size_t n_bytes);

/* Put a saved state, of 0 bytes if there is none, behind a volatile one, whose memory may move.
 * Returns 0 or -ENOMEM; then nothing has changed. */
int saved_append(uint8_t **volatile_state, size_t *n_bytes, const uint8_t *saved,
                 size_t saved_bytes);

/* Tell how many bytes of an image of both are the saved state's. Returns false for what is none. */
bool saved_measure(const uint8_t *image, size_t n_bytes, size_t *volatile_bytes,
                   size_t *saved_bytes);
