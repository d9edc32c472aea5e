#include "unasked.h"

#include "check.h"

/* A letter for each custody, in the order of their enum: off, and on. */
struct row {
    const char off[4], on[TPM_CUSTODIES + 1];
};

/* A tail on an active TPM that is on: a vtpmd has taken up what it was granted since, and the TPM
 * with it. A held TPM may be granted: a vtpmd that comes knows. */
static const struct row rows[UNASKED_COMMANDS] = {
    /*                               AGF    AGFRSP */
    [UNASKED_INIT] = {"ggr", "ggrrww"},      [UNASKED_INIT_NEW] = {"wwr", "wwrrww"},
    [UNASKED_INIT_TAIL] = {"rrr", "irrrww"}, [UNASKED_STOP] = {"ggg", "ggggww"},
    [UNASKED_STATE] = {"ggg", "gggggg"},     [UNASKED_BLOB] = {"ggr", "ggrrww"},
    [UNASKED_TAIL] = {"rrr", "rrrrrr"},      [UNASKED_CONNECTED] = {"ggg", "gggggg"},
    [UNASKED_RUNS] = {"ggg", "ggaagg"},
};

enum unasked unasked_verdict(enum unasked_command command, enum tpm_power power,
                             enum tpm_custody custody)
{
    check(power == TPM_ON || custody <= TPM_FENCED);
    const struct row *row = &rows[command];
    return (enum unasked)(power == TPM_ON ? row->on : row->off)[custody];
}
