#include "version.h"

#define NAMES(final, temporary)                                                                    \
    .prefix = (final), .temporary_prefix = (temporary), .journal_name = final ".journal",          \
    .journal_temporary_name = temporary ".journal", .arrived_name = final ".arrived",              \
    .arrived_temporary_name = temporary ".arrived"

static const struct version versions[] = {
    [VERSION_1_2] =
        {
            .number = VERSION_1_2,
            .name = "1.2",
            .library = 0, /* TPMLIB_TPM_VERSION_1_2 */
            NAMES("tpm-00", "TMP-00"),
            .response_tag = 0x00c4, /* TPM_TAG_RSP_COMMAND: TPM main part 2, 6 */
            .failure = 0x009,       /* TPM_FAIL: 16 */
            .retry = 0x800,         /* TPM_RETRY */
            .command_size = 0x019,  /* TPM_BAD_PARAM_SIZE */
            .is_started = 0x026,    /* TPM_INVALID_POSTINIT */
            .failure_name = "TPM_FAIL",
            .retry_name = "TPM_RETRY",
            .command_wait_ms = 1500,
        },
    [VERSION_2_0] =
        {
            .number = VERSION_2_0,
            .name = "2.0",
            .library = 1, /* TPMLIB_TPM_VERSION_2 */
            NAMES("tpm2-00", "TMP2-00"),
            .response_tag = 0x8001, /* TPM_ST_NO_SESSIONS: TPM 2.0 part 2, 6.9 */
            .failure = 0x101,       /* TPM_RC_FAILURE: 6.6.3 */
            .retry = 0x922,         /* TPM_RC_RETRY */
            .command_size = 0x142,  /* TPM_RC_COMMAND_SIZE */
            .is_started = 0x100,    /* TPM_RC_INITIALIZE */
            .failure_name = "TPM_RC_FAILURE",
            .retry_name = "TPM_RC_RETRY",
            .command_wait_ms = 250,
            .has_shutdown = true,
            .abandons = true,
            .takes_prefix = true,
        },
};

static const struct version *now = &versions[VERSION_2_0];

bool version_set(uint32_t number)
{
    if (number != VERSION_1_2 && number != VERSION_2_0)
        return false;
    now = &versions[number];
    return true;
}

const struct version *version_now(void)
{
    return now;
}
