/* The journal's reader: decides what a state directory holds after a crash, or that it must not be
 * used. It looks at bytes only; reading the files, and doing what is decided, is the caller's.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta.h"
#include "journal_format.h"

/* What was found. Nothing in it is trusted. */
struct journal_evidence {
    const uint8_t *checkpoint; /* the image in the state file, decoded; NULL: no such file */
    size_t checkpoint_bytes;
    bool continued;         /* the state file says that a journal continues it */
    const uint8_t *journal; /* the file; NULL: no such file */
    size_t journal_bytes;
    const uint8_t *identity; /* that the journal must have; NULL: any */
    const uint8_t *secret;   /* that it must be sealed with; NULL: it must not be sealed */
};

/* The rows of the table in journal_recover.c. */
enum journal_verdict {
    JOURNAL_A_NOTHING = 'A',
    JOURNAL_B_CHECKPOINT = 'B',
    JOURNAL_C_MISSING = 'C',
    JOURNAL_D_NO_CHECKPOINT = 'D',
    JOURNAL_E_HEADER_WRONG = 'E',
    JOURNAL_F_UNKNOWN = 'F',
    JOURNAL_G_FOREIGN = 'G',
    JOURNAL_H_KEY_NEEDED = 'H',
    JOURNAL_I_NOT_SEALED = 'I',
    JOURNAL_J_KEY_WRONG = 'J',
    JOURNAL_K_DAMAGED = 'K',
    JOURNAL_L_OTHER_CHECKPOINT = 'L',
    JOURNAL_M_RESULT_DIFFERS = 'M',
    JOURNAL_N_TAIL_DROPPED = 'N',
    JOURNAL_O_WHOLE = 'O',
};

/* What exactly is wrong, for rows E, F and K. */
enum journal_fault {
    JOURNAL_FAULT_NONE = 0,
    JOURNAL_FAULT_LENGTH = 1,     /* the file's: not what the header says, or past a limit */
    JOURNAL_FAULT_MAGIC = 2,      /* it is no journal */
    JOURNAL_FAULT_CHECKSUM = 3,   /* the header's */
    JOURNAL_FAULT_VERSION = 4,    /* unknown */
    JOURNAL_FAULT_FLAG = 5,       /* an incompatible one is unknown */
    JOURNAL_FAULT_HEADER = 6,     /* a number in it is past a limit */
    JOURNAL_FAULT_SECTOR = 7,     /* altered: neither empty nor with the right checksum */
    JOURNAL_FAULT_ORDER = 8,      /* not what comes here: records are missing or moved */
    JOURNAL_FAULT_GAP = 9,        /* an empty sector, and written ones after it */
    JOURNAL_FAULT_RECORD = 10,    /* its length is not that of its sectors */
    JOURNAL_FAULT_LINK = 11,      /* it does not continue the one before, or was altered */
    JOURNAL_FAULT_DELTA = 12,     /* the delta record in it is invalid */
    JOURNAL_FAULT_OTHER_BASE = 13 /* the delta record is for another image */
};

struct journal_recovery {
    uint8_t verdict;     /* enum journal_verdict */
    uint8_t fault;       /* enum journal_fault */
    bool has_image;      /* an image was made; after a refusal too, of what was right before */
    bool is_sealed;      /* as far as the header was right */
    uint32_t offset;     /* in the file: of the fault, or of what is dropped */
    uint32_t used_bytes; /* up to the last byte that is not zero */
    uint32_t n_records;  /* whole and right */
    uint32_t n_applied;  /* of them, after the checkpoint */
    uint64_t generation; /* of the image */
    size_t image_bytes;
    uint8_t identity[JOURNAL_IDENTITY_BYTES]; /* the journal's, as far as the header was right */
};

/* A record that is whole and right, as who looks into a vTPM's history is told of it. */
struct journal_step {
    uint32_t offset;       /* in the file: of its first sector */
    uint32_t n_sectors;    /* that it takes */
    uint32_t delta_offset; /* in the history: of its delta record, decrypted, */
    uint32_t delta_bytes;  /* and that one's length */
    bool is_applied;       /* the checkpoint did not have it */
    struct delta_header header;
};

struct journal_history {
    size_t n_steps;      /* in the order of the file */
    size_t deltas_bytes; /* of `deltas` that are written: they are state in the clear */
    struct journal_step steps[JOURNAL_RECORDS_MAX];
    uint8_t deltas[JOURNAL_BYTES_MAX];
};

/* True for the rows that a vTPM may start from. */
bool journal_may_start(const struct journal_recovery *recovery);

/* Recover into `image`, of IMAGE_BYTES_MAX bytes. In rows A and B nothing is made, as the
 * checkpoint, if there is one, is the state. Takes time in proportion to the journal's length and,
 * for each record, the image's. Returns 0, or -ENOMEM. */
int journal_recover(const struct journal_evidence *evidence, uint8_t *image,
                    struct journal_recovery *recovery);

/* The same, and tell of each record. */
int journal_recover_history(const struct journal_evidence *evidence, uint8_t *image,
                            struct journal_recovery *recovery, struct journal_history *history);
