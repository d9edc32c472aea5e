/* What only some versions of libtpms have. Which one this is, is known when it runs: one build is
 * for all of them, and the headers that it was built with do not say. */
#pragma once

#include <libtpms/tpm_library.h>

enum {
    LIBRARY_INFO_AVAILABLE_PROFILES = 64, /* of TPMLIB_GetInfo(); ignored before libtpms 0.10 */
};

/* Make the next TPM that is made one of this profile, which is JSON. TPM_BAD_PARAMETER before
 * libtpms 0.10, which knows none; else what TPMLIB_SetProfile() returns. */
TPM_RESULT library_set_profile(const char *profile);
