/* The part of a session from the freeze to the Grant, as a function of a state and an event, in one
 * table and without I/O: the same code runs in the engine (blackout.c), in the model and in the
 * simulator.
 *
 *     source        none ─OFFER─► prepared ─RECORDED─► offered ─ASKED─► frozen ─TAKE─► retiring
 *                                   │                                    ▲               ▲ │
 *                                   └─ASKED─► given ─RECORDED────────────┘               │ RETIRED
 *                                               └─TAKE─► wanted ─RECORDED────────────────┘ ▼
 *                                                                                        granted
 *     destination   none ─TAIL─► taking ─INIT─► waiting ─GRANT─► started
 *                                  └─GRANT─► entitled ─INIT─► started
 *
 * What vtpmd has decided before is what there is: a lane and, at the destination, images that a
 * tail continues; at the source, what OFFER brings. From there on it is only told, and
 * has to ask if it wants something else: a session that was granted is not ended any more. The
 * owner record is written while QEMU takes the tail, brings it to the destination, and that asks
 * for the vTPM: only the Grant comes after it. docs/stream-format.md has the table.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "handover.cdef.h"

/* True if QEMU gets a tail when it asks. */
bool handover_has_tail(enum handover_state state);

/* True if it has got one, and the vTPM has not been granted for it. */
bool handover_has_given(enum handover_state state);

/* True if it has brought one here: what the TPM was started from is, or will be, the vTPM. */
bool handover_has_taken(enum handover_state state);

enum {
    HANDOVER_N_STATES = HANDOVER_STARTED + 1,
    HANDOVER_N_EVENTS = HANDOVER_TIMED_OUT + 1,
};
