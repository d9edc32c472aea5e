#include "standby.h"

#include <libtpms/tpm_error.h>
#include <libtpms/tpm_library.h>
#include <stdlib.h>

#include "check.h"
#include "digest.h"
#include "nvram.h"

TPM_RESULT tpm_stand_by(struct tpm *any, enum link_shutdown said, const uint8_t *permanent,
                        size_t permanent_bytes, const uint8_t *rest, size_t rest_bytes)
{
    uint8_t digests[2][DIGEST_BYTES];
    struct nvram_states states = {
        .permanent = permanent,
        .permanent_bytes = permanent_bytes,
        .permanent_digest = digests[0],
        .volatile_state = rest,
        .volatile_bytes = rest_bytes,
        .volatile_digest = digests[1],
    };

    check(digest_compute(permanent, permanent_bytes, digests[0]) == 0);
    check(digest_compute(rest, rest_bytes, digests[1]) == 0);
    return tpm_init_standby(any, said, &states);
}

TPM_RESULT tpm_stand_by_again(struct tpm *any)
{
    unsigned char *permanent;
    uint32_t permanent_bytes;

    TPM_RESULT result = TPMLIB_GetState(TPMLIB_STATE_PERMANENT, &permanent, &permanent_bytes);
    if (result != TPM_SUCCESS)
        return result;
    result = tpm_stand_by(any, LINK_SHUTDOWN_NONE, permanent, permanent_bytes, NULL, 0);
    free(permanent);
    return result;
}
