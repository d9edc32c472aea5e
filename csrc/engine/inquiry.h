/* Asking libtpms, in a process that serves nothing: what it says of itself, whether it takes a
 * profile, whether it takes a state; or for the state of a new TPM.
 *
 * Standard input has messages of the engine link, as a boot record does: LINK_SET_PROFILE and
 * LINK_LOAD_STATE, the permanent state first. Standard output gets libtpms' version, and from the
 * second line on the JSON that TPMLIB_GetInfo() returns, or the state; or of the first message that
 * libtpms refuses its operation and argument, and the result, in decimal. Standard error gets
 * libtpms' own words, in which there is nothing secret: it logs bytes of commands, and there are
 * none but those that make a key.
 */
#pragma once

#include <stdint.h>

#include "link_types.h"

/* Ask with these flags of TPMLIB_GetInfo(), of a TPM of that enum version_number: of the one that
 * the states make if there are any. */
enum link_inquiry inquiry_run(uint32_t version, uint32_t flags);

/* Make a TPM of that enum version_number, as its first start would, and give its permanent state
 * away: it is in no file. A TPM 1.2's has an endorsement key, and no owner. */
enum link_inquiry inquiry_make(uint32_t version);
