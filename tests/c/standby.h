/* A TPM on standby, as a session has one started ahead of its guest. */
#pragma once

#include "tpm.h"

/* Have any TPM on standby, from these; of a volatile state there may be nothing. */
TPM_RESULT tpm_stand_by(struct tpm *any, enum link_shutdown said, const uint8_t *permanent,
                        size_t permanent_bytes, const uint8_t *rest, size_t rest_bytes);

/* From what libtpms has, off, of a permanent state. */
TPM_RESULT tpm_stand_by_again(struct tpm *any);
