#include "custody.h"

#include <string.h>

#include "check.h"

/* A letter for each custody, in the order of their enum: verdicts off and on, and the custody once
 * it is done, by its first letter: '.' is the same, 'a' is active for what a standby goes back to.
 */
struct row {
    const char off[4], on[TPM_CUSTODIES + 1], then[TPM_CUSTODIES + 1];
};

static const struct row rows[] = {
    /*                        AGF    AGFRSP    AGFRSP */
    [OP_EXECUTE] = {"fff", "ddfwfw", "AA...."},
    [OP_INIT] = {"ddf", "ddffll", "AA...."},
    [OP_INIT_CAME] = {"ddd", "ddddll", "AAAA.."},
    [OP_INIT_STANDBY] = {"ddd", "ddddll", "SSSS.."},
    [OP_EXPECT] = {"nnn", "nnnndd", "....PP"},
    [OP_ADMIT] = {"nnn", "nnnndd", "....AA"},
    [OP_LET_GO] = {"iii", "iiidll", "...F.."},
    [OP_FORGET_STATE] = {"ddd", "nnnnll", "......"},
    [OP_STOP] = {"iii", "ddddll", "...F.."},
    [OP_STOP_FENCED] = {"ddd", "ddddll", "FFFF.."},
    [OP_AWAIT] = {"nni", "nnddnn", "..RR.."},
    [OP_AWAIT_NO_MORE] = {"nni", "nnidnn", "...F.."},
    [OP_RETIRE_UNCHANGED] = {"fff", "ddddff", "FFFF.."},
    [OP_RETIRE_UNSERVED] = {"ddd", "dddddd", "FFFFFF"},
    [OP_UNRETIRE] = {"ddd", "dddddd", "AAAAaa"},
    [OP_GET_ESTABLISHED] = {"nnn", "ddddnd", "......"},
    [OP_RESET_ESTABLISHED] = {"nnn", "ddffnn", "AA...."},
    [OP_HASH] = {"nnn", "ddffnn", "AA...."},
    [OP_CANCEL] = {"nnn", "dddddd", "......"},
    [OP_STORE_VOLATILE] = {"nnn", "ddffnn", "AA...."},
    [OP_GET_PERMANENT] = {"nnn", "ddffnn", "GG...."},
    [OP_GET_OTHER] = {"nnn", "ddffnn", "......"},
    [OP_SET_STATE] = {"ddd", "nnnnnn", "......"},
    [OP_CAPTURE] = {"nnn", "ddnnnn", "......"},
    [OP_COPY] = {"nnn", "ddnnnn", "......"},
    [OP_STORE_PERMANENT] = {"dff", "dfffff", "......"},
    [OP_SET_UP] = {"ddd", "nnnnnn", "......"},
    [OP_SET_BUFFER_SIZE] = {"ddd", "nnnndn", "......"},
    [OP_HAS_STATE] = {"ddd", "dddddd", "......"},
    [OP_GET_LINEAGE] = {"ddd", "dddddd", "......"},
    [OP_RAISE_GENERATION] = {"ddd", "dddddd", "......"},
    [OP_RUN_ON] = {"ddd", "dddddd", "AA...."},
    [OP_GET_INFO] = {"ddd", "dddddd", "......"},
    [OP_ABANDON] = {"ddd", "dddddd", "......"},
};

enum tpm_verdict custody_verdict(enum tpm_operation operation, enum tpm_power power,
                                 enum tpm_custody custody)
{
    check(power == TPM_ON || custody <= TPM_FENCED);
    const struct row *row = &rows[operation];
    return (enum tpm_verdict)(power == TPM_ON ? row->on : row->off)[custody];
}

enum tpm_custody custody_after(enum tpm_operation operation, enum tpm_custody custody,
                               enum tpm_custody *before)
{
    static const char letters[] = "AGFRSP";
    char then = rows[operation].then[custody];

    if (then == '.')
        return custody;
    if (then == 'a') {
        *before = TPM_ACTIVE;
        return custody;
    }
    enum tpm_custody after = (enum tpm_custody)(strchr(letters, then) - letters);
    if (after == TPM_STANDBY)
        *before = custody == TPM_RECLAIMING ? TPM_FENCED : custody;
    return after;
}

bool custody_is_ahead(enum tpm_custody custody)
{
    return custody == TPM_STANDBY || custody == TPM_PENDING;
}
