/* A TPM 1.2's saved state: what TPM_SaveState keeps for a TPM_Startup(ST_STATE), as a guest sleeps.
 *
 * libtpms writes it as a file of its own, and removes it at the next command, which makes it of no
 * use: to start from it a second time would bring back PCRs that were extended since. Whether there
 * is one the volatile state says, too; what it would hold libtpms can tell at any time, as nothing
 * has changed since. So it does not move by itself:
 *
 *   - as a blob it is given only if there is one. swtpm gives one always;
 *   - with a volatile state that comes, it is there if that says so, whatever blob has come;
 *   - a session brings none: it is made anew, if the guest slept.
 *
 * What of the volatile state is read (TPM_VolatileAll_Store() in libtpms' tpm_startup.c):
 *
 *     u16 tag 1
 *     32 bytes                             constants that it was compiled with
 *     u16
 *     u16 tag 0x20, 5 × u8                 TPM_STCLEAR_FLAGS
 *     u16 tag 0x21, u8, 2 × u32, u8        TPM_STANY_FLAGS, up to
 *     u8                                   whether there is a saved state
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Return whether a volatile state says that there is a saved one; false if it cannot be told. */
bool saved_is_there(const uint8_t *volatile_state, size_t n_bytes);
