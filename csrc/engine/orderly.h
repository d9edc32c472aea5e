/* What a permanent state says of its guest's last TPM2_Shutdown, in libtpms' own format.
 *
 * libtpms has no question for it, and a state that comes as swtpm has it has no other word of it.
 * It notes the kind with the state (orderlyState), and strikes it out at TPM2_Startup, and when a
 * later command changes what a TPM2_Startup(STATE) would bring back: what is struck out was not
 * said, as far as this can tell.
 *
 * The format is PERSISTENT_ALL_Marshal()'s in libtpms' NVMarshal.c, which appends to a section in
 * later versions, and counts up what it changes. These are read:
 *
 *     u16 version 3 or 4, u32 magic, u16       the state
 *     sized                                    from 4 on: the profile
 *     u16 version 3, u32 magic, u16            constants that it was compiled with
 *     u32 count, count × u32, block
 *     u16 version 4 or 5, u32 magic, u16       what is persistent
 *     u8, 3 × u16                              disableClear, algorithms
 *     12 × sized                               policies, authorisations, seeds, proofs
 *     u64, u32, block                          reset counters; PCR policies
 *     u32 count, count × (u16, u8-sized)       PCR banks
 *     sized, 4 × u32, u8                       physical presence; dictionary attacks
 *     u16                                      orderlyState
 *
 * Sized: a u16, and so many bytes. Block: a u8, and what is sized. A state is from outside: each
 * length is compared with what there is.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "link_types.h"

/* Return the kind, or LINK_SHUTDOWN_NONE: there was none since TPM2_Startup, or it is not known. */
enum link_shutdown orderly_shutdown(const uint8_t *permanent, size_t n_bytes);
