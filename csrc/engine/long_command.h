/* A command that may be long, while somebody says when the guest stops.
 *
 * QEMU waits for the command that runs before it asks for the TPM's state, and to make an RSA key
 * takes up to half a second, all of it in the guest's downtime. So while this is armed, the state
 * is saved before a command that may be long, and a thread of its own executes it, which can be
 * left behind: when the guest stops, the command is abandoned. Its response is TPM_RC_RETRY, at
 * once, and the saved state is the TPM's from then on.
 *
 *     idle ──execute──► running ──a change is to be stored──► committing
 *      ▲▲                │   └──────────answered──────────┐       │
 *      │└────────────────┼────────────────────────────────┴───────┘
 *      │                 └──abandon──► abandoned ──it has run out──► spent
 *      └─────────────────────────────────────forget──────────────────┘
 *
 * A command is wholly done and answered, or wholly undone: to commit and to abandon are both
 * decided under the TPM's lock, from running, and there is no way from the one to the other.
 *
 * That lock is over all of this, and whoever has it has libtpms and the images of nvram.h; but not
 * all of it in every phase. What a phase means, and whose is what meanwhile:
 *
 *     idle        no such command is under way: all is the lock's
 *     running     the thread has libtpms; nvram is the lock's; the saved state is from before
 *     committing  the thread has libtpms and nvram, and will answer
 *     abandoned   the thread has libtpms, computes in vain, and can change nothing any more;
 *                 nvram is the lock's; the saved state is the TPM's
 *     spent       as abandoned, but the thread has run out: libtpms is the lock's, with something
 *                 in it that is of no use
 *
 * docs/ARCHITECTURE.md has what is done of each operation in each, and tests/c/test_long_command.c
 * compares all of it with a TPM. A TPM that is off, or on standby, is in phase idle. libtpms is
 * process-global, and so is this.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "custody.h"
#include "link_types.h"

struct tpm_response;
struct turn;

enum long_phase {
    LONG_IDLE,
    LONG_RUNNING,
    LONG_COMMITTING,
    LONG_ABANDONED,
    LONG_SPENT,
    LONG_PHASES,
};

/* What becomes of an operation that custody has done. */
enum long_verdict {
    LONG_DO = 'd',
    LONG_NOTHING = 'i',   /* a success: there is nothing to do */
    LONG_SAVED = 's',     /* done with the saved state in place of libtpms' */
    LONG_WAIT = 'w',      /* until the phase is another one */
    LONG_TAKE_BACK = 'r', /* done, once libtpms has the saved state again */
};

enum long_verdict long_verdict(enum tpm_operation operation, enum long_phase phase);

/* With the TPM's lock, and what is told when the phase has changed; both outlive this. */
void long_command_init(pthread_mutex_t *lock, struct turn *turn);

/* Start the thread. Returns 0 or a negative errno. */
int long_command_start(void);

/* Without the lock, and in no other phase than idle: end the thread, if there is one. */
void long_command_deinit(void);

/* Somebody says when the guest stops; returns false without a thread. Or nobody does any more.
 * Never waits. */
bool long_command_arm(bool is_so);

/* With the lock from here on, but for long_command_may_store(). */

bool long_command_is_armed(void);

enum long_phase long_command_phase(void);

/* In phase idle, before a command: keep a state, which is the callee's then. */
void long_command_save(enum link_state_type type, uint8_t *state, size_t state_bytes);

/* Return what was saved. It is the callee's, and there until long_command_forget(). */
const uint8_t *long_command_saved(enum link_state_type type, size_t *state_bytes);

/* From spent to idle, or in it: overwrite and free what was saved. */
void long_command_forget(void);

/* Execute a command apart, and wait, without the lock, until it is answered or abandoned. What was
 * saved is forgotten once it is answered. Returns false if it was abandoned: there is no response.
 */
bool long_command_execute(const uint8_t *command, size_t command_bytes,
                          struct tpm_response *response);

/* The guest stops: abandon the command that runs, unless it commits. Returns true if that is so. */
bool long_command_abandon(void);

/* For libtpms' callbacks, with the lock or on the thread: returns false if what is to be stored is
 * an abandoned command's, which has not happened. */
bool long_command_may_store(void);
